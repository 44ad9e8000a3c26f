"""A Jinja environment for chat templates of unknown origin: no access outside the template, bounded time and memory.

Jinja's sandbox keeps a template away from Python's internals, but not from endless loops or huge texts. Here everything
that repeats (an iteration, a call, a filter) checks the CPU time, and every value that the template makes is measured,
where possible before it is made. For that the syntax tree is changed before it is compiled: loops and macros get a
statement that checks the time, and literals, slices and joined texts pass through a filter. The names of these filters
cannot be written in a template.
"""

from collections.abc import Callable
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.visitor import NodeTransformer

from fastllama import template_filters as filters
from fastllama.template_limits import current

STEP, MADE, SLICED, JOINED = "fastllama step", "fastllama made", "fastllama sliced", "fastllama joined"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers gives it to chat templates, with limits. Render inside `limited`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        # Constants are not folded: that would run filters while a template is compiled.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            finalize=filters.finalize,
        )
        self.globals.pop("lipsum")
        self.globals |= {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": filters.TemplateNamespace,
            "range": filters.counted_range,
            "raise_exception": filters.raise_exception,
            "strftime_now": filters.strftime_now,
        }
        for name in filters.REMOVED_FILTERS:
            self.filters.pop(name, None)
        self.filters |= {"tojson": filters.tojson, "join": filters.join}
        for name, function in list(self.filters.items()):
            self.filters[name] = filters.limited_filter(function, filters.FILTER_CHECKS.get(name))
        self.filters |= {STEP: filters.step, MADE: filters.made, SLICED: filters.sliced, JOINED: filters.joined}

    def compile_template(self, source: str) -> jinja2.Template:
        """The template, with the limits compiled in. Raises jinja2.TemplateSyntaxError, RecursionError and others."""
        tree = _Limiter().visit(self.parse(source))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def call(__self: Any, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a global or a method."""
        limits = current()
        limits.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = filters.checked_text_call(limits, owner, __obj.__name__, args, kwargs)
        elif isinstance(__obj, BuiltinMethodType) and not isinstance(owner, dict | list | tuple | range):
            raise SecurityError(f"calls {__obj.__name__} of {type(owner).__name__}, which templates may not")
        return limits.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """One of `intercepted_binops`."""
        limits = current()
        limits.step()
        limits.check_operator(operator, left, right)
        return limits.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map`, with limits on widths; None for any other value."""
        if super().wrap_str_format(value) is None:
            return None
        text, formatter = str(value.__self__), _LimitedFormatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: formatter.vformat(text, (), mapping)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)


class _LimitedFormatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        limits = current()
        limits.step()
        limits.check_widths(format_spec)
        return limits.made(super().format_field(value, format_spec))


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's text for training. Renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Limiter(NodeTransformer):
    """Adds the filters that measure to a syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self._limit_body(node)
        if node.test is not None:  # it also runs for items that never reach the body
            node.test = nodes.And(_filter(nodes.Const(0), STEP), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._limit_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._limit_body(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._limit_body(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), JOINED)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filter(self.generic_visit(node), MADE)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _filter(self.generic_visit(node), MADE)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, MADE) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, SLICED) if isinstance(node.arg, nodes.Slice) else node

    def _limit_body(self, node: Any) -> nodes.Node:
        """Begin the body with a check that also counts the plain text in it."""
        chars = sum(len(data.data) for child in node.body for data in _template_data(child))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(chars), STEP)))
        return node  # type: ignore[no-any-return]


def _template_data(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)
