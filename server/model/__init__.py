"""How a step is computed: Transformers model classes with our attention, experts and LoRA injected.

Read injections/ first: it lists everything that is ours. Adapter tables arrive inside a step's inputs.
"""

from server.kernels_name import keep_transformers_off

keep_transformers_off()  # must come before any model code is imported
