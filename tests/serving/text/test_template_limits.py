"""No template can run for long or make large values; what usual templates do is not touched."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.text.template_limits import LimitedEnvironment, TemplateLimitError, limit_steps

BIG = "10000000000"
TWINS = ("{% set a = namespace(v=(1,)) %}{% set b = namespace(v=(1,)) %}{% for i in range(60) %}"
         "{% set a.v = (a.v, a.v) %}{% set b.v = (b.v, b.v) %}{% endfor %}{{ ? }}")
SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) if n else 1 }}{{ f(n - 1) if n else 1 }}{% endmacro %}{{ f(60) }}",
    "{% for i in range(99999) %}{{ (x * 9999) | upper | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ (x * 9999).upper() | length }}{% endfor %}",
    "{{ [1] | batch(9999999, 0) | list }}", "{{ [1] | slice(9999999) | list }}",
    "{{ ('a ' * 9999999) | wordwrap(1) }}",
    *(TWINS.replace("?", question) for question in (
        "a.v == b.v", "a.v in [b.v]", "a.v is eq(b.v)", "[a.v] | select('eq', b.v) | list", "[a.v, b.v] | sort",
        "[a.v, b.v] | max", "{a.v: 1}", "{1: 2}[a.v]", "{1: 2}.get(a.v)", "[a.v].index(b.v)", "dict.fromkeys([a.v])",
        "[a.v, a.v] | unique | list")),
]
LARGE = [
    f"{{{{ x * {BIG} }}}}", f"{{{{ {BIG} * x }}}}", f"{{{{ [1] * {BIG} }}}}", f"{{{{ 2 ** {BIG} }}}}",
    f"{{{{ x | center({BIG}) }}}}", f"{{{{ x.ljust({BIG}) }}}}", f"{{{{ x.zfill({BIG}) }}}}",
    f"{{{{ '%{BIG}d' % 1 }}}}", f"{{{{ '%*d' % ({BIG}, 1) }}}}", f"{{{{ '%{BIG}d' | format(1) }}}}",
    f"{{{{ '{{:{BIG}}}'.format(1) }}}}", f"{{{{ '{{:{{}}}}'.format(1, {BIG}) }}}}",
    f"{{{{ 'a\\nb' | indent({BIG}) }}}}", f"{{{{ 'a\\t'.expandtabs({BIG}) }}}}",
    "{{ (x * 9999).replace('x', x * 9999) }}", "{{ (x * 9999) | replace('x', x * 9999) }}",
    "{{ ([x * 99999] * 99999) | join }}", "{{ ([x] * 99999) | join(x * 99999) }}",
    "{{ (x * 99999).join([x] * 99999) }}",
    "{% set ns = namespace(v=x) %}{% for i in range(99) %}{% set ns.v = ns.v ~ ns.v %}{% endfor %}",
    "{% set ns = namespace(v=x) %}{% for i in range(99) %}{% set ns.v = ns.v + ns.v %}{% endfor %}",
    "{% set ns = namespace(v=3) %}{% for i in range(99) %}{% set ns.v = ns.v * ns.v %}{% endfor %}",
    "{% set ns = namespace(v=[x]) %}{% for i in range(60) %}{% set ns.v = [ns.v, ns.v] %}{% endfor %}{{ ns.v }}",
    "{% set ns = namespace(v=[x]) %}{% for i in range(60) %}{% set ns.v = [ns.v] * 2 %}{% endfor %}{{ ns.v|upper }}",
    "{% set n = namespace(v={}) %}{% for i in range(60) %}{% set n.v = {1: n.v, 2: n.v} %}{% endfor %}{{ x ~ n.v }}",
    f"{{{{ [x] | tojson(indent={BIG}) }}}}", f"{{{{ 1.5 | round({BIG}, 'ceil') }}}}",
    f"{{{{ [x] | batch({BIG}, x) | list }}}}", f"{{{{ [x] | slice({BIG}) | list }}}}",
]
USUAL = [
    "{% for i in [3, 4] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ i }} {% else %}none{% endfor %}",
    "{% for i in [] %}{{ i }}{% else %}none{% endfor %}{% for i in nothing %}{{ i }}{% else %}none{% endfor %}",
    "{% for a, b in {'k': 1, 'l': 2}.items() if b > 1 %}{{ a ~ b ~ none ~ no }}{% endfor %}",
    "{% for n in tree recursive %}{{ n.v }}{% if n.c %}({{ loop(n.c) }}){% endif %}{% endfor %}",
    "{{ 'a' * 3 + 'b' }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ '%5d|%s' % (3, x) }}{{ '{:>4}'.format(x) }}{{ 7 % 4 }}",
    "{{ x | center(9) }}{{ 'a\\nb' | indent(2) }}{{ ['a', 'b'] | join(', ') }}{{ 'xyx' | replace('x', 'l') }}",
    "{{ tree | map(attribute='v') | list }}{{ tree | selectattr('c') | list | length }}{{ tree | length }}{{ tree }}",
    "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}{{ range(3) | list }}",
    "{{ 2.567 | round(1) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2) | list }}",
    "{{ 'a b' | wordwrap(1) }}{{ {x: 1}[x] }}{{ tree[0]['v'] }}{{ tree[-1:] }}{{ {x: 1}.get(x) }}{{ [3].index(3) }}",
    "{{ x == 'x' != 3 }}{{ x in ['x'] }}{{ 'v' in tree[0] }}{{ x is in(['x']) }}{{ 1 < 2 <= 2 }}",
    "{{ x is defined }}{{ no is defined }}{{ tree is sequence }}{{ tree[0] is mapping }}{{ none is none }}",
    "{% set y %}a{{ x }}{% endset %}{{ y | trim | upper }}{{ 1 == 1.0 }}{{ true }}{{ 10000000000 | string }}",
]
VALUES = {"x": "x", "tree": [{"v": 1, "c": [{"v": 2}]}, {"v": 3}]}


def rendered(source: str) -> str:
    limit_steps(1, 10)
    environment = LimitedEnvironment([], {})
    environment.globals["dict"] = dict
    return environment.limited_template(source).render(VALUES)


@pytest.mark.parametrize("source", SLOW)
def test_a_slow_template_is_ended(source: str) -> None:
    with pytest.raises(TemplateLimitError, match="too many steps"):
        rendered(source)


@pytest.mark.parametrize("source", LARGE)
def test_a_large_value_is_not_made(source: str) -> None:
    with pytest.raises(TemplateLimitError, match="it makes a|too many steps"):
        rendered(source)


@pytest.mark.parametrize("source", USUAL)
def test_usual_templates_are_rendered_as_by_jinja(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert rendered(source) == plain.from_string(source).render(VALUES)


def test_a_budget_grows_with_the_conversation() -> None:
    template = LimitedEnvironment([], {}).limited_template("{% for i in range(99999) %}{% endfor %}" * 2)
    limit_steps(1, 10)
    with pytest.raises(TemplateLimitError):
        template.render()
    limit_steps(1000, 10_000)
    assert template.render() == ""
