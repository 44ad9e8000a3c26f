"""Hostile and damaged chat templates: every one is a ValueError in one line, soon, and nothing outside is touched."""

import threading

import pytest

from fastllama.chat_template import MAX_SOURCE_CHARS, ChatTemplate

LARGE = "it makes a text or list of size"
TOTAL = "it makes too much text or too many values"
SLOW = "it takes more than 1 s"
DEEP = "RecursionError maximum recursion depth exceeded"
UNSAFE = "access to attribute"
DOUBLED = "{% set ns = namespace(x=START) %}{% for i in range(100) %}BODY{% endfor %}{{ ns.x | tojson }}"


def doubled(start: str, value: str) -> str:
    """A template that makes a value from two of itself, 100 times."""
    return DOUBLED.replace("START", start).replace("BODY", "{% set ns.x = " + value + " %}")


HOSTILE = {
    "class": ("{{ ''.__class__.__mro__ }}", UNSAFE),
    "init": ("{{ cycler.__init__.__globals__ }}", UNSAFE),
    "attr filter": ("{{ (''|attr('__class__')).x }}", UNSAFE),
    "subscript": ("{{ ''['__class__'].x }}", UNSAFE),
    "map attribute": ("{{ ['']|map(attribute='__class__.x')|list }}", UNSAFE),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", UNSAFE),
    "format_map": ("{{ '{a.__class__.x}'.format_map({'a': 1}) }}", UNSAFE),
    "loop": ("{% for i in [1] %}{{ loop._iterator.x }}{% endfor %}", UNSAFE),
    "append": ("{{ messages.append(1) }}", UNSAFE),
    "update": ("{{ messages[0].update(a=1) }}", UNSAFE),
    "namespace": ("{{ namespace(__class__=1) }}", "sets '__class__' of a namespace"),
    "set namespace": ("{% set ns = namespace() %}{% set ns._a = 1 %}", "sets '_a' of a namespace"),
    "include": ("{% include '/etc/passwd' %}", "TypeError no loader"),
    "import": ("{% import 'os' as os %}", "TypeError no loader"),
    "times": ("{{ 'a' * 10**9 }}", LARGE),
    "times of a list": ("{{ 10**9 * [1] }}", LARGE),
    "times of nothing": ("{{ [''] * 10**6 }}", LARGE),
    "power": ("{{ 2 ** 99 ** 99 ** 99 }}", "it computes a number of more than 4096 bits"),
    "squares": (doubled("3", "ns.x * ns.x"), "it computes a number of more than 4096 bits"),
    "float power": ("{{ 10.0 ** 1000 }}", "OverflowError"),
    "range": ("{{ range(10**12) }}", "range of 1000000000000 numbers; at most 100000"),
    "ranges": ("{% for i in range(99999) %}{% set x = range(99999) %}{% endfor %}", TOTAL),
    "lists": ("{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}", TOTAL),
    "nested loops": ("{% for a in range(99999) %}{% for b in 'ab' * 9999 %}{% endfor %}{% endfor %}", SLOW),
    "nested loops that skip": (
        "{% set l = 'a' * 99999 %}{% for a in l %}{% for b in l if b == 'c' %}{% endfor %}{% endfor %}",
        SLOW,
    ),
    "loops in filters": (
        "{% set l = [1] * 99999 %}{% for a in l %}{{ l | map('string') | map('length') | sum }}{% endfor %}",
        SLOW,
    ),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", SLOW),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DEEP),
    "recursive loop": ("{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", DEEP),
    "recursive block": ("{% block a %}{{ self.a() }}{% endblock %}", DEEP),
    "output": ("{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}", LARGE),
    "output of values": ("{% for i in range(99999) %}{{ 'x' * 10000 }}{% endfor %}", LARGE),
    "captured text": ("{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}", TOTAL),
    "joined": (doubled("'ab'", "ns.x ~ ns.x"), LARGE),
    "added": (doubled("'ab'", "ns.x + ns.x"), LARGE),
    "added lists": (doubled("[1]", "ns.x + ns.x"), LARGE),
    "percent": (doubled("'ab'", "'%s%s' % (ns.x, ns.x)"), LARGE),
    "formatted": (doubled("'ab'", "'{0}{0}'.format(ns.x)"), LARGE),
    "replaced": (doubled("'ab'", "ns.x.replace('a', 'aa')"), LARGE),
    "joined list": (doubled("'ab'", "[ns.x, ns.x] | join"), LARGE),
    "list of lists": (doubled("[1]", "[ns.x, ns.x]"), LARGE),
    "tuple of tuples": (doubled("[1]", "(ns.x, ns.x)"), LARGE),
    "dict of dicts": (doubled("[1]", "{'a': ns.x, 'b': ns.x}"), LARGE),
    "dict by call": (doubled("[1]", "dict(a=ns.x, b=ns.x)"), LARGE),
    "deep list": (doubled("[1]", "[ns.x]"), "it nests lists or dicts deeper than 64"),
    "center": ("{{ 'a' | center(10**9) }}", LARGE),
    "indent": ("{{ 'a' | indent(10**9) }}", LARGE),
    "indent by text": ("{{ ('a\n' * 9999) | indent('b' * 9999) }}", LARGE),
    "batch": ("{{ [1] | batch(10**9, 0) | list }}", LARGE),
    "slice": ("{{ [1] | slice(10**9) | list }}", LARGE),
    "round": ("{{ 1.5 | round(10**9) }}", "it computes a number of more than 4096 bits"),
    "sum": ("{{ [[1], [1]] | sum(start=[]) }}", "the filter sum adds numbers only"),
    "tojson": ("{{ [1] | tojson(indent=10**9) }}", LARGE),
    "tojson of deep indent": ("{{ ([[[[1]]]] * 9999) | tojson(indent=9999) }}", LARGE),
    "join filter": ("{{ (['a'] * 9999) | join('b' * 9999) }}", LARGE),
    "join method": ("{{ ('b' * 9999).join('a' * 9999) }}", LARGE),
    "joined attributes": ("{{ ([{'a': 'b' * 999}] * 99999) | join(attribute='a') }}", LARGE),
    "mapped": ("{{ range(99999) | map('string') | map('center', 99999) | join }}", TOTAL),
    "replace filter": ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", LARGE),
    "replace method": ("{{ ('a' * 9999).replace('', 'b' * 9999) }}", LARGE),
    "ljust": ("{{ 'a'.ljust(10**9) }}", LARGE),
    "zfill": ("{{ 'a'.zfill(10**9) }}", LARGE),
    "percent width": ("{{ '%1000000000d' % 1 }}", LARGE),
    "percent star": ("{{ '%*d' % (10**9, 1) }}", LARGE),
    "percent precision": ("{{ '%.999999999f' % 1.5 }}", LARGE),
    "percent digits": ("{{ '%" + "9" * 9999 + "d' % 1 }}", LARGE),
    "percent names": ("{{ ('%(a)s' * 9999) % {'a': 'x' * 9999} }}", LARGE),
    "format filter": ("{{ '%1000000000s' | format('a') }}", LARGE),
    "format width": ("{{ '{:>1000000000}'.format(1) }}", LARGE),
    "format nested width": ("{{ '{:{}}'.format(1, 10**9) }}", LARGE),
    "to_bytes": ("{{ (5).to_bytes(10**9) }}", "calls to_bytes of int, which templates may not"),
    "expandtabs": ("{{ '\t'.expandtabs(10**9) }}", "calls the method expandtabs of a text"),
    "encode": ("{{ 'a'.encode('utf-16') }}", "calls the method encode of a text"),
    "rfind": ("{{ ('a' * 10**6).rfind('ab' ~ 'a' * 9999) }}", "calls rfind with a text of more than 1000"),
    "strip": ("{{ ('a' * 10**6).strip('b' * 9999) }}", "calls strip with a text of more than 1000"),
    "trim": ("{{ ('a' * 10**6) | trim('b' * 9999) }}", "calls trim with a text of more than 1000"),
    "int": ("{{ ('f' * 10**6) | int(0, 16) // 3 }}", "calls int with a text of more than 1000"),
    "bound method": ("{% set f = 'a'.center %}{{ f(10**9) }}", LARGE),
    "markup": ("{{ ('%1000000000d' | safe) % 1 }}", LARGE),
    "generators": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(50000) %}{% set ns.x = ns.x | map('string') %}{% endfor %}"
        "{{ ns.x | list }}",
        DEEP,
    ),
    "strftime_now": ("{{ strftime_now('%Y' * 9999) }}", "strftime_now of a format of more than 1000"),
    "lipsum": ("{{ lipsum(10**9) }}", "'lipsum' is undefined"),
    "undefined": ("{{ a.b }}", "'a' is undefined"),
    "undefined field": ("{{ messages[0].tool.name }}", "'dict object' has no attribute 'tool'"),
    "raises": ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError division by zero"),
    "types": ("{{ 1 + 'a' }}", "TypeError unsupported operand"),
    "tojson of undefined": ("{{ a | tojson }}", "TypeError Object of type Undefined"),
}
NOT_TEMPLATES = {
    "tag": ("\n{% if %}", ", line 2: not a valid template: Expected an expression"),
    "unknown tag": ("{% debug %}", ", line 1: not a valid template: Encountered unknown tag 'debug'"),
    "open tag": ("{% generation %}", ", line 1: not a valid template: Unexpected end of template"),
    "filter": ("{{ 'a' | urlize }}", ", line 1: not a valid template: No filter named 'urlize'"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ": not a valid template: RecursionError"),
    "loops": ("{% for a in [] %}" * 30 + "{% endfor %}" * 30, ": not a valid template: SyntaxError"),
    "ifs": ("{% if 1 %}" * 200 + "{% endif %}" * 200, ": not a valid template: IndentationError"),
    "digits": ("{{ " + "9" * 5000 + " }}", ": not a valid template: ValueError Exceeds the limit"),
    "length": ("x" * (MAX_SOURCE_CHARS + 1), f": the template has {MAX_SOURCE_CHARS + 1} characters"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_template_is_an_error(case: str) -> None:
    source, reason = HOSTILE[case]
    messages = [{"role": "user", "content": "Hi"}]
    template = ChatTemplate(source, name="bad.jinja")
    with pytest.raises(ValueError) as raised:
        template.render(messages)
    text = str(raised.value)
    # A slow machine may reach the limit of time before that of size.
    assert text.startswith(tuple("bad.jinja: the template cannot be rendered: " + one for one in (reason, SLOW)))
    assert "\n" not in text and len(text) < 400
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("case", NOT_TEMPLATES)
def test_source_that_is_not_a_template(case: str) -> None:
    source, reason = NOT_TEMPLATES[case]
    with pytest.raises(ValueError) as raised:
        ChatTemplate(source, name="bad.jinja")
    assert str(raised.value).startswith("bad.jinja" + reason) and "\n" not in str(raised.value)


def test_nothing_is_computed_while_a_template_is_compiled() -> None:
    ChatTemplate("{{ 'a' * 10**9 }}{{ 'a' | center(10**9) }}{{ 10**9**9 }}{{ [1] | slice(10**9) | list }}")


def test_the_next_rendering_has_limits_of_its_own() -> None:
    template = ChatTemplate("{% if messages[0].content %}{{ 'a' * 10**9 }}{% endif %}{{ 'a' * 10**6 }}")
    for _ in range(3):
        with pytest.raises(ValueError, match=LARGE):
            template.render([{"role": "user", "content": "Hi"}])
        assert len(template.render([{"role": "user", "content": ""}])[0].text) == 10**6


def test_long_messages_are_rendered() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content.split('x')[-1] ~ m.content | trim }}{% endfor %}")
    dialog = [{"role": "user", "content": "é" * 10**6}] * 12
    assert template.render(dialog)[0].text == "é" * (24 * 10**6)


def test_threads_render_one_template() -> None:
    template = ChatTemplate("{% for i in range(200) %}{{ messages[0].content }}{% endfor %}")
    results: dict[int, str] = {}

    def render(index: int) -> None:
        results[index] = template.render([{"role": "user", "content": str(index)}])[0].text

    threads = [threading.Thread(target=render, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: str(index) * 200 for index in range(8)}
