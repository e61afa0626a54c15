"""The sections of the census, in the page's order."""

from tests.census.dora_rows import DORA
from tests.census.esft_rows import ESFT
from tests.census.expert_rows import EXPERTS, ROUTER
from tests.census.format_rows import FORMATS
from tests.census.lora_rows import LORA
from tests.census.made import Section

SECTIONS: tuple[Section, ...] = (LORA, DORA, EXPERTS, ROUTER, FORMATS, ESFT)
