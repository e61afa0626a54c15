"""Templates that nobody has read: what families and adapters use is rendered as Transformers does, what would take the
server's time or memory is refused."""

import gc
import os
import resource
import time
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template  # type: ignore[attr-defined]

from server.api.texts.template_budget import MAX_LOOPS, MAX_SECONDS, TooCostly
from server.api.texts.template_sandbox import MAX_TEMPLATE_CHARS, Sandbox

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hi <b>&</b> \n\nthere\n"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nHello!"},
    {"role": "user", "content": "Bye"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": [1, 2.5, None], "a": "ü<"}}}]
VARIABLES: dict[str, Any] = dict(messages=MESSAGES, tools=TOOLS, add_generation_prompt=True, bos_token="<s>")


def rendered(source: str, **variables: Any) -> str:
    sandbox = Sandbox()
    return sandbox.rendered(sandbox.compiled(source), VARIABLES | variables)


# what templates of the families do, in short
SOUND = {
    "llama": "{{- bos_token }}{% if messages[0]['role'] == 'system' %}{% set system_message = "
    "messages[0]['content']|trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system_message = '' %}{% endif %}{{ system_message }}"
    "{% for message in messages %}{{- '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim }}"
    "{% endfor %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}",
    "qwen3": "{% set ns = namespace(multi=true, last=messages|length - 1) %}{% for message in messages[::-1] %}"
    "{% set index = (messages|length - 1) - loop.index0 %}{% if ns.multi and message.role == 'user' and "
    "message.content is "
    "string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}{% set ns.multi "
    "= false %}"
    "{% set ns.last = index %}{% endif %}{% endfor %}{{ ns.last }}{% for message in messages %}{% if '</think>' in "
    "message.content %}{{ message.content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}|"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}{% endif %}{% if loop.first or (not loop.last and "
    "(messages[loop.index0 - 1].role != 'tool')) %}x{% endif %}{{ loop.revindex }}{{ loop.length }}{% endfor %}",
    "gpt-oss": "{% macro shown(spec, depth=0) %}{% if spec is mapping %}{ {%- for key, it in spec.items() %}{{ key }}: "
    "{{ shown(it, depth + 1) }}{{ ', ' if not loop.last }}{% endfor %} }{% elif spec is iterable and spec is not "
    "string %}"
    "{{ spec|join(' | ') }}{% else %}{{ spec }}{% endif %}{% endmacro %}{{ shown(tools[0]) }}",
    "mistral": "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ users|length }}"
    "{% if (users|length % 2 == 0) != false %}even{% endif %}{{ messages|map(attribute='role')|join(',') }}"
    "{% for m in messages if m.role in ['user', 'system'] %}{{ loop.index }}{{ m.content|replace('i', 'j') }}{% "
    "endfor %}",
    "others": "{{ tools[0]|tojson }}{{ {'b': 1, 'a': [true, none]}|dictsort }}{{ [3, 1, 2]|sort|list }}{{ (1, 2) }}"
    "{{ ['a']|first ~ 3 ~ 'x'|upper }}{{ '%s-%d' % ('a', 3) }}{{ '{}:{x:>4}'.format(1, x=2) }}{{ 'a b'|title }}"
    "{{ messages[1].content|indent(2) }}{{ nothing }}{{ nothing|default('d') }}{{ [1, 2]|sum }}{{ 2.567|round(1) }}"
    "{{ 'ab'.center(6) }}{{ range(3)|list }}{{ ('a' * 3) + 'b' }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ "
    "messages[-1]['content'][:2] }}"
    "{% set x %}in {{ 'side' }}{% endset %}{{ x }}{% filter upper %}f{% endfilter %}{% generation %}g{% "
    "endgeneration %}"
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}"
    "{% for m in [[1, [2]], [3]] recursive %}{{ loop(m) if m is not number else m }}{% endfor %}{{ "
    "dict(a=1).get('a') }}"
    "{% for k, v in {'p': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}{% call(y) wrapped() %}{{ y }}{% "
    "endcall %}",
}


@pytest.mark.parametrize("name", SOUND)
def test_what_families_do_is_rendered_as_transformers_does(name: str) -> None:
    source = "{% macro wrapped() %}[{{ caller(5) }}]{% endmacro %}" + SOUND[name]
    expected = _compile_jinja_template(source).render(**VARIABLES)
    assert rendered(source) == expected != ""


def test_a_long_conversation_is_far_from_its_limits() -> None:
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(1024)]
    for name in ("llama", "qwen3", "mistral"):
        start = time.process_time()
        assert rendered(SOUND[name], messages=messages)
        assert time.process_time() - start < MAX_SECONDS
    looked_back = "{% for m in messages %}{% for n in messages[: loop.index0] %}{% endfor %}{% endfor %}done"
    assert rendered(looked_back, messages=messages[:700]) == "done"


DAG = "{% set ns = namespace(l=['x' * 100]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
DAG_OF_NAMESPACES = (
    "{% set a = namespace() %}{% set s = namespace(now=a) %}{% for i in range(60) %}{% set n = namespace() %}"
    "{% set n.x = [s.now, s.now] %}{% set s.now = n %}{% endfor %}"
)
BIG = "{% set a = 'x' * 4000000 %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}yyyyyyyyyy{% endfor %}{% "
    "endfor %}",
    "loops in a macro": "{% macro m() %}{% for b in range(99999) %}y{% endfor %}{% endmacro %}"
    "{% for a in range(99999) %}{% set x = m() %}{% endfor %}",
    "a loop that is asked its length": "{% for a in range(99999) %}{% for b in range(99999)|map('abs') %}{{ "
    "loop.length }}"
    "{% endfor %}{% endfor %}",
    "a long body": "{% for a in range(99999) %}" + "{{ a }}" * 8_000 + "{% endfor %}",
    "a long body in a set block": "{% set x %}{% for a in range(99999) %}" + "y" * 60_000 + "{% endfor %}{% endset %}",
    "recursion that branches": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ "
    "m(60) }}",
    "recursion without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "blocks that call themselves": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a long text": "{{ 'x' * 10 ** 9 }}",
    "a long list": "{{ ([0] * 10 ** 9)|length }}",
    "a long tuple": "{{ (10 ** 9 * (0,))|length }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor "
    "%}",
    "large texts that are kept": "{% set ns = namespace(l=namespace()) %}{% for i in range(999) %}{% set n = "
    "namespace() %}"
    "{% set n.s = 'x' * 1000000 ~ i %}{% set n.l = ns.l %}{% set ns.l = n %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "powers": "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a large number in digits": "{{ ('f' * 8000000)|int(base=16) % 12345 }}",
    "division": "{% set n = ('f' * 4000000)|int(0, 16) %}{{ n // 3 }}",
    "rounding": "{{ 1|round(10 ** 9) }}",
    "rounding down": "{{ 12|round(-10 ** 9) }}",
    "a format's width": "{{ '%1000000000d' % 1 }}",
    "a format's width by argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "a format filter's width": "{{ '%1000000000d'|format(1) }}",
    "a field's width": "{{ '{:>1000000000}'.format(1) }}",
    "a field's width by argument": "{{ '{:>{}}'.format(1, 10 ** 9) }}",
    "a field's width of a map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "fields": BIG + "{{ ('{0}' * 10000).format(a) }}",
    "percents": BIG + "{{ ('%(a)s' * 10000) % {'a': a} }}",
    "center": "{{ 'x'.center(10 ** 9) }}",
    "ljust": "{{ 'x'.ljust(10 ** 9) }}",
    "rjust": "{{ 'x'['rjust'](10 ** 9) }}",
    "zfill": "{{ 'x'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "translate": BIG + "{{ a.translate({120: a}) }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "the center filter": "{{ 'x'|center(10 ** 9) }}",
    "the batch filter": "{{ [1]|batch(10 ** 9, 0)|list }}",
    "the indent filter": "{{ ('\n' * 1000000)|indent(1000) }}",
    "the indent filter's width": "{{ 'x\ny'|indent(10 ** 9) }}",
    "replacing": BIG + "{{ a.replace('x', a) }}",
    "replacing nothing": BIG + "{{ a.replace('', a) }}",
    "the replace filter": BIG + "{{ a|replace('x', a) }}",
    "joining": BIG + "{{ a.join(a) }}",
    "joining lists": BIG + "{{ a.join([a, a] * 1000) }}",
    "the join filter": BIG + "{{ range(99999)|join(a) }}",
    "the join filter on attributes": BIG + "{% set n = namespace(a=a) %}{{ ([n] * 9999)|join('', attribute='a') }}",
    "splitting": "{% set a = 'ab ' * 2500000 %}{% set b = a.split() %}",
    "splitting at a letter": "{% set a = 'ab,' * 2500000 %}{% set b = a.split(',') %}",
    "splitting lines": "{% set a = 'ab\n' * 2500000 %}{% set b = a.splitlines() %}",
    "title": "{{ ('ab ' * 2500000)|title }}",
    "a text as a list": BIG + "{{ a|list|length }}",
    "a text sorted": BIG + "{{ a|sort|length }}",
    "a text without what is not in it": BIG + "{{ a|select('equalto', 'y')|list }}",
    "summing lists": "{{ ([range(50000)|list] * 1000)|sum(start=[]) }}",
    "filters in a loop": "{% set a = range(50000)|list %}{% for i in range(99999) %}{% set b = a|sort %}{% endfor %}",
    "an empty selection in a loop": "{% set a = range(50000)|list %}{% for i in range(99999) %}{% set b = "
    "a|select('gt', "
    "100000)|list %}{% endfor %}",
    "lists of lists of one text, written": DAG + "{{ ns.l }}",
    "lists of lists of one text, as JSON": DAG + "{{ ns.l|tojson }}",
    "lists of lists, compared": DAG + DAG.replace("ns", "nt") + "{{ ns.l == nt.l }}",
    "dicts of dicts": DAG.replace("[ns.l, ns.l]", "{'a': ns.l, 'b': ns.l}") + "{{ ns.l|string }}",
    "dicts by call": DAG.replace("[ns.l, ns.l]", "dict(a=ns.l, b=ns.l)") + "{{ ns.l|string }}",
    "lists written many times": "{% set l = ['x' * 4000000] %}{% set y %}" + "{{ l }}" * 1000 + "{% endset %}",
    "lists joined many times": "{% set l = ['x' * 4000000] %}{{ " + "~".join(["l"] * 1000) + " }}",
    "slices that are kept": "{% set l = [0] * 50000 %}" + "".join(f"{{% set l{i} = l[1:] %}}" for i in range(2000)),
    "JSON with deep indents": "{% set ns = namespace(l=[0] * 50000) %}{% for i in range(200) %}{% set ns.l = [ns.l] %}"
    "{% endfor %}{{ ns.l|tojson(indent=1000) }}",
    "JSON with long separators": BIG + "{{ range(999)|list|tojson(separators=(a, a)) }}",
    "JSON with a long indent": BIG + "{{ [1]|tojson(indent=a) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 6) }}",
    "much output": "{% for i in range(9999) %}" + "x" * 1000 + "{% endfor %}",
    "nothing but output": "{% set a = 'x' * 1000000 %}" + "{{ a }}" * 100,
    "a long template": "x" * (MAX_TEMPLATE_CHARS + 1),
    "many operators": "{{ " + "1+" * 30_000 + "1 }}",
    "many brackets": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "many lists": "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "many blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "many loops": "{% for a in b %}" * 100 + "{% endfor %}" * 100,
    "many filters": "{{ 'a'" + "|e" * 30_000 + " }}",
    "constants that are folded": "{{ " + "~".join(["'x'.center(9)|replace('', 'y' * 9999)"] * 1000) + " }}",
}  # fmt: skip
HARMLESS = {
    "lists of namespaces": DAG_OF_NAMESPACES + "{{ s.now }}{{ s.now == a }}",
    "many expressions": "{{ a }}" * (MAX_TEMPLATE_CHARS // 7),
}


def in_a_child(source: str, room: int = 200 << 20) -> tuple[str, float]:
    """What rendering came to, and the seconds it took, with so many more bytes of addresses than now."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        gc.freeze()  # as the server does: a collection would walk all that the tests before have made
        start = time.process_time()
        try:
            outcome = f"rendered {len(rendered(source)):,}"
        except MemoryError:
            outcome = "out of memory"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        os.write(writes, f"{time.process_time() - start} {outcome}".encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        seconds, _, outcome = answer.read().partition(" ")
    os.waitpid(child, 0)
    return outcome or "killed", float(seconds or "inf")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_in_seconds_and_200_megabytes(name: str) -> None:
    outcome, seconds = in_a_child(HOSTILE[name])
    assert not outcome.startswith(("rendered", "out of memory", "killed")), outcome
    assert seconds < 5


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_ones_are_rendered(name: str) -> None:
    outcome, seconds = in_a_child(HARMLESS[name])
    assert outcome.startswith("rendered") and seconds < 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "500,000 turns"),
        ("{{ 'x' * 10 ** 9 }}", "more than 8,388,608 characters"),
        ("{{ 9 ** 9999 }}", "a number of more than 4,096 bits"),
        ("{{ ('x' * 4000000)|list }}", "goes through more than 131,072 items"),
    ],
)
def test_a_refusal_names_the_limit(source: str, message: str) -> None:
    with pytest.raises(TooCostly, match=message):
        rendered(source)
    assert issubclass(TooCostly, TemplateError) and MAX_LOOPS == 500_000
