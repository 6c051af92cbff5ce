"""No template can run for long or make large values; what usual templates do is not touched."""

from __future__ import annotations

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serving.text.template_limits import LimitedEnvironment, TemplateLimitError, limit_steps

BIG = "10000000000"
SLOW = [
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) if n else 1 }}{{ f(n - 1) if n else 1 }}{% endmacro %}{{ f(60) }}",
    "{% for i in range(99999) %}{{ (x * 9999) | upper | length }}{% endfor %}",
    "{% for i in range(99999) %}{{ (x * 9999).upper() | length }}{% endfor %}",
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
    f"{{{{ [x] | tojson(indent={BIG}) }}}}",
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
    "{% set y %}a{{ x }}{% endset %}{{ y | trim | upper }}{{ 1 == 1.0 }}{{ true }}{{ 10000000000 | string }}",
]
VALUES = {"x": "x", "tree": [{"v": 1, "c": [{"v": 2}]}, {"v": 3}]}


def rendered(source: str) -> str:
    limit_steps(1, 10)
    return LimitedEnvironment([], {}).limited_template(source).render(VALUES)


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
