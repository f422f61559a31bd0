"""Which form of message content a chat template expects: a string or a list of parts. Knows only syntax.

The rule is vLLM's: `openai` (a list of parts) when the template loops over the content of a message, `string`
otherwise. The walk follows names through assignments, loops, namespaces and macro arguments until nothing new
is learnt; scopes are not told apart, which real templates never need.
"""

from __future__ import annotations

from enum import Enum

from jinja2 import nodes


class _Kind(Enum):
    MESSAGES = "the message list or a part of it"
    MESSAGE = "one message"
    CONTENT = "the content of a message"


_KEEPS_LIST = frozenset(
    {"list", "select", "reject", "selectattr", "rejectattr", "reverse", "sort", "map", "slice"}
)
_ONE_OF_LIST = frozenset({"first", "last", "random"})


def detect(template: nodes.Template) -> str:
    """ "openai" or "string"."""
    names = _learn(template)
    loops = template.find_all(nodes.For)
    return "openai" if any(_kind(loop.iter, names) is _Kind.CONTENT for loop in loops) else "string"


def _learn(template: nodes.Template) -> dict[str, set[_Kind]]:
    names: dict[str, set[_Kind]] = {"messages": {_Kind.MESSAGES}}
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    while True:
        before = sum(map(len, names.values()))
        for assign in template.find_all(nodes.Assign):
            _bind(assign.target, _kind(assign.node, names), names)
        for loop in template.find_all(nodes.For):
            if _kind(loop.iter, names) is _Kind.MESSAGES:
                _bind(loop.target, _Kind.MESSAGE, names)
        for call in template.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                _bind_arguments(macro, call, names)
        if sum(map(len, names.values())) == before:
            return names


def _bind(target: nodes.Node, kind: _Kind | None, names: dict[str, set[_Kind]]) -> None:
    name = _name(target)
    if kind is not None and name is not None:
        names.setdefault(name, set()).add(kind)


def _bind_arguments(macro: nodes.Macro, call: nodes.Call, names: dict[str, set[_Kind]]) -> None:
    for parameter, argument in zip(macro.args, call.args, strict=False):
        _bind(parameter, _kind(argument, names), names)
    for keyword in call.kwargs:
        if any(parameter.name == keyword.key for parameter in macro.args):
            _bind(nodes.Name(keyword.key, "param"), _kind(keyword.value, names), names)


def _name(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    return None


def _kind(node: nodes.Node | None, names: dict[str, set[_Kind]]) -> _Kind | None:
    """What an expression stands for. A name of several kinds counts as content first."""
    if isinstance(node, nodes.Name):
        return _strongest(names.get(node.name))
    if isinstance(node, nodes.Getattr):
        if isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in names:
            return _strongest(names[f"{node.node.name}.{node.attr}"])
        return _member(node.node, node.attr, names)
    if isinstance(node, nodes.Getitem):
        return _item(node, names)
    if isinstance(node, nodes.Filter):
        inner = _kind(node.node, names)
        if node.name in _KEEPS_LIST or (node.name in {"default", "d"}):
            return inner
        return _Kind.MESSAGE if node.name in _ONE_OF_LIST and inner is _Kind.MESSAGES else None
    if isinstance(node, nodes.CondExpr):
        return _kind(node.expr1, names) or _kind(node.expr2, names)
    if isinstance(node, nodes.Add | nodes.Or | nodes.And):
        # "messages + [x]" is a list still; "content + '...'" is a string.
        either = _kind(node.left, names) or _kind(node.right, names)
        return None if isinstance(node, nodes.Add) and either is _Kind.CONTENT else either
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        key = node.args[0] if node.args else None
        return _member(node.node.node, key.value, names) if isinstance(key, nodes.Const) else None
    return None


def _item(node: nodes.Getitem, names: dict[str, set[_Kind]]) -> _Kind | None:
    inner = _kind(node.node, names)
    if isinstance(node.arg, nodes.Slice):
        return inner
    if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return _member(node.node, node.arg.value, names)
    return _Kind.MESSAGE if inner is _Kind.MESSAGES else None


def _member(owner: nodes.Node, key: object, names: dict[str, set[_Kind]]) -> _Kind | None:
    return _Kind.CONTENT if key == "content" and _kind(owner, names) is _Kind.MESSAGE else None


def _strongest(kinds: set[_Kind] | None) -> _Kind | None:
    for kind in (_Kind.CONTENT, _Kind.MESSAGE, _Kind.MESSAGES):
        if kinds and kind in kinds:
            return kind
    return None
