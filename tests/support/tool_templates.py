"""Chat templates that do with tools what those of the families do by whose calls they are named, and no more."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from server.api.texts.speech import AS_SHOWN, Formats
from server.api.texts.text import Text
from tests.support.live_server import write_tokenizer

_CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set call = call.function %}CALL{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HERMES = _CHATML.replace(
    "CALL",
    "{% if not loop.first or m.content %}{{ '\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}\n</tool_call>',
)
THINKING = HERMES.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "{{ m.content }}", "{{ (m.content or '').split('</think>')[-1] }}"
)
QWEN3_XML = _CHATML.replace(
    "CALL",
    "\n<tool_call>\n<function={{ call.name }}>\n{% for key, value in call.arguments | items %}"
    "<parameter={{ key }}>\n{{ value | tojson | safe if value is mapping or (value is sequence and value is not string)"
    " else value | string }}\n</parameter>\n{% endfor %}</function>\n</tool_call>",
)
GLM4 = _CHATML.replace(
    "CALL",
    "\n<tool_call>{{ call.name }}\n{% for key, value in call.arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}</tool_call>",
)
MINIMAX = _CHATML.replace(
    "CALL",
    '{% if loop.first %}<minimax:tool_call>{% endif %}\n<invoke name="{{ call.name }}">\n'
    '{% for key, value in call.arguments.items() %}<parameter name="{{ key }}">'
    "{{ value if value is string else value | tojson }}</parameter>\n{% endfor %}</invoke>"
    "{% if loop.last %}\n</minimax:tool_call>{% endif %}",
)
SEED = _CHATML.replace(
    "CALL",
    "\n<seed:tool_call>\n<function={{ call.name }}>\n{% for key, value in call.arguments.items() %}"
    "<parameter={{ key }}>{{ value if value is string else value | tojson }}</parameter>\n{% endfor %}</function>\n"
    "</seed:tool_call>",
)
LFM2 = _CHATML.replace(
    "CALL",
    "{% if loop.first %}<|tool_call_start|>[{% else %}, {% endif %}{{ call.name }}("
    "{% for key, value in call.arguments.items() %}{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}"
    "{% endfor %}){% if loop.last %}]<|tool_call_end|>{% endif %}",
)
NEMOTRON = _CHATML.replace(
    "CALL",
    "{% if loop.first %}<TOOLCALL>[{% else %}, {% endif %}"
    '{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}'
    "{% if loop.last %}]</TOOLCALL>{% endif %}",
)
# one call a turn, and what it says beside it is left out
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' and loop.first and tools %}<|start_header_id|>user<|end_header_id|>\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{{ m.content }}<|eot_id|>"
    "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('only single tool-calls at once') }}{% endif %}{% set call = m.tool_calls[0].function %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PYTHONIC = LLAMA3.replace(
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}',
    "[{% for c in m.tool_calls %}{{ c.function.name }}({% for key, value in c.function.arguments.items() %}{{ key }}="
    "{{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}"
    "{% endfor %}]",
).replace("m.tool_calls | length != 1", "false")
# ids of nine letters or digits, and beside each call
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] ["
    "{% for tool in tools %}{{ tool | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}][/AVAILABLE_TOOLS]"
    "{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    '{% set out = call.function | tojson %}{{ out[:-1] }}, "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    '{% elif m.role == \'tool\' %}[TOOL_RESULTS] {"content": {{ m.content | tojson }}, "call_id": '
    '"{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}{% endif %}{% endfor %}"
)
MISTRAL_ARGS = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
# arguments are put together with other strings, so they must be one
DEEPSEEK_V3 = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is none %}{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
    "{% for call in m.tool_calls %}{{ '\n' if not loop.first else '' }}{{ '<｜tool▁call▁begin｜>' + call.type + "
    "'<｜tool▁sep｜>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}"
    "{{ '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content + "
    "'<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
DEEPSEEK_V31 = (
    "{{ bos_token }}{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}"
    "{% elif m.role == 'system' %}{{ m.content }}"
    "{% else %}{{ '<｜Assistant｜></think>' }}{{ m.content or '' }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>"
    "{% for call in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' }}"
    "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
    "{{ '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{{ '<think>' if thinking else '</think>' }}"
    "{% endif %}"
)
KIMI_K2 = (
    "{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.name or m.role }}<|im_middle|>"
    "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}<|tool_call_begin|>{{ call.id }}"
    "<|tool_call_argument_begin|>{% if call.function.arguments is string %}{{ call.function.arguments }}{% else %}"
    "{{ call.function.arguments | tojson }}{% endif %}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
# a call ends the turn, so there is one
HARMONY = (
    "{% if tools %}<|start|>developer<|message|>{% for tool in tools %}type {{ tool.function.name }} = "
    "{{ tool.function.parameters | tojson }}\n{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{% if m.reasoning_content %}<|start|>assistant<|channel|>analysis<|message|>{{ m.reasoning_content }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GRANITE = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson(indent=4) }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "{% if m.tool_calls %}<|tool_call|>[{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
INTERNLM = _CHATML.replace(
    "CALL",
    '<|action_start|><|plugin|>\n{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}'
    "<|action_end|>\n",
)
UNREAD = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
UNKNOWN = _CHATML.replace("CALL", "\nI call {{ call.name }} and give it {{ call.arguments | tojson }}")

# the template, and the format that it is found to write; reasoning too
KNOWN = {
    "hermes": (HERMES, "hermes"), "thinking": (THINKING, "hermes"), "qwen3_xml": (QWEN3_XML, "qwen3_xml"),
    "glm4": (GLM4, "glm4"), "minimax_m2": (MINIMAX, "minimax_m2"), "seed": (SEED, "seed"), "lfm2": (LFM2, "lfm2"),
    "nemotron": (NEMOTRON, "nemotron"), "llama3": (LLAMA3, "llama3_json"), "pythonic": (PYTHONIC, "pythonic"),
    "mistral": (MISTRAL, "mistral"), "mistral_args": (MISTRAL_ARGS, "mistral_args"),
    "deepseek_v3": (DEEPSEEK_V3, "deepseek_v3"), "deepseek_v31": (DEEPSEEK_V31, "deepseek_v31"),
    "kimi_k2": (KIMI_K2, "kimi_k2"), "harmony": (HARMONY, "harmony"), "granite": (GRANITE, "granite"),
    "internlm": (INTERNLM, "internlm"),
}  # fmt: skip
MARKERS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>",
    "[TOOL_CALLS]", "[ARGS]", "[INST]", "[/INST]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜end▁of▁sentence｜>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>",
    "<|call|>", "<|return|>", "<|constrain|>", "<|tool_call|>", "<|/tool_call|>", "<|action_start|>", "<|plugin|>",
    "<|action_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
)  # fmt: skip
PLAIN_MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>",
                 "</arg_value>")  # fmt: skip


def text_with(template: str, directory: Path, formats: Formats = AS_SHOWN) -> Text:
    """With a tokenizer of bytes that has all the markers above as tokens."""
    write_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MARKERS))
    tokenizer.add_tokens([AddedToken(it, special=False, normalized=False) for it in PLAIN_MARKERS])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|end|>"}))
    return Text.load(directory, formats)
