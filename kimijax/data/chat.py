"""Conversations as text and as token ids: Kimi K2's own format, or a model's Jinja template.

In K2's format every turn is `<|im_ROLE|>NAME<|im_middle|>BODY<|im_end|>`, without line breaks
between turns (chat_template.jinja and docs/tool_call_guidance.md of Kimi-K2).
"""

import contextlib
import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from kimijax.data.foreign import CONFIG, need, refusing
from kimijax.data.tokenizer import Tokenizer
from kimijax.errors import UserError

SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
ROLES = ("system", "user", "assistant", "tool")
MAX_RENDERED = 1 << 26  # characters
MAX_BITS = 4096  # of a whole number that a template multiplies up
MAX_SECONDS = 10.0  # of one rendering, which takes milliseconds

_TEMPLATE_FAULT = "the chat template fails", "mend it, or leave it out for Kimi K2's own format"


class Mark(str):
    """The name of a special token where it means structure; any other str is what someone wrote."""


IM_SYSTEM, IM_USER, IM_ASSISTANT, IM_MIDDLE, IM_END = (
    Mark(f"<|im_{name}|>") for name in ("system", "user", "assistant", "middle", "end")
)
CALLS, CALLS_END = Mark("<|tool_calls_section_begin|>"), Mark("<|tool_calls_section_end|>")
CALL, ARGUMENTS, CALL_END = (
    Mark(f"<|tool_call_{name}|>") for name in ("begin", "argument_begin", "end")
)


def render_chat(
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> str:
    """A conversation as one text; UserError names the message that is malformed.

    messages   {"role", "content"} and optionally "name"; an assistant's "tool_calls" hold {"id",
               "function": {"name", "arguments"}}, a tool's message has its "tool_call_id"; a list
               of text parts as content is joined
    tools      function declarations; Kimi's own tokenizer sorts their keys and so does its format
               here, a template gets them as they are
    template   Jinja source, as transformers renders it; None: Kimi K2's own format
    variables  what else the template reads, as bos_token

    A template is a stranger's program. The sandbox keeps it from the machine; time is checked at
    every turn of a loop, call and filter, size before what commonly makes text long. A limit on the
    process must stop what is left: one slow step, deeply nested lists. The text does not tell what
    a user wrote from structure: `encode_chat` does.
    """
    messages, tools = _checked_chat(messages, tools)
    if template is None:
        return "".join(_parts(messages, tools, add_generation_prompt))
    with refusing(*_TEMPLATE_FAULT), _time_limit():
        pieces = _compiled(template).generate(
            **dict(variables or {}),
            messages=messages,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
        )
        return "".join(_bounded(pieces))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    template: str | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> list[int]:
    """The ids of a conversation, in which nothing that anyone wrote becomes a special token.

    In Kimi K2's own format contents are encoded as ordinary text. A template mixes them with
    structure, so there any string with the name of a special token in it is refused.
    """
    messages, tools = _checked_chat(messages, tools)
    if template is None:
        return _encode_parts(tokenizer, _parts(messages, tools, add_generation_prompt))
    with refusing("the messages cannot be searched", "nest them less"):
        for text in _strings([messages, tools]):
            for name in tokenizer.specials:
                if name in text:
                    raise UserError(
                        f"the messages hold {name!r}, a special token: remove it, or leave the "
                        "chat template out, since in Kimi K2's own format it is harmless"
                    )
    names = {i: name for name, i in tokenizer.specials.items()}
    known = {"bos_token": names.get(tokenizer.bos, "")}
    known["eos_token"] = names.get(tokenizer.eos[0], "") if tokenizer.eos else ""
    known |= variables or {}
    text = render_chat(messages, tools, template, add_generation_prompt, known)
    return tokenizer.encode(text, special=True)


def _encode_parts(tokenizer: Tokenizer, parts: Iterator[str]) -> list[int]:
    ids: list[int] = []
    written = ""  # encoded as one, since a token may span what two parts say
    for part in parts:
        if not isinstance(part, Mark):
            written += part
            continue
        if part not in tokenizer.specials:
            raise UserError(
                f"the tokenizer has no special token {part!s}: put the model's {CONFIG} beside "
                "its tokenizer, or use the model's chat template"
            )
        ids += [*tokenizer.encode(written), tokenizer.specials[part]]
        written = ""
    return ids + tokenizer.encode(written)


def _parts(
    messages: Sequence[Mapping], tools: Sequence[Mapping], add_generation_prompt: bool
) -> Iterator[str]:
    """Kimi K2's own format: marks and what stands between them."""
    if tools:
        declared = json.dumps(tools, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        yield from (IM_SYSTEM, "tool_declare", IM_MIDDLE, declared, IM_END)
    if messages[0]["role"] != "system":
        yield from (IM_SYSTEM, "system", IM_MIDDLE, SYSTEM, IM_END)
    for message in messages:
        role = message["role"]
        opening = {"user": IM_USER, "assistant": IM_ASSISTANT}.get(role, IM_SYSTEM)
        yield from (opening, message.get("name") or role, IM_MIDDLE)
        if role == "tool":
            yield f"## Return of {message['tool_call_id']}\n"
        yield message["content"] or ""
        if calls := message.get("tool_calls"):
            yield CALLS
            for call in calls:
                yield from (CALL, call["id"], ARGUMENTS, _arguments(call), CALL_END)
            yield CALLS_END
        yield IM_END
    if add_generation_prompt:
        yield from (IM_ASSISTANT, "assistant", IM_MIDDLE)


def _arguments(call: Mapping) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _checked_chat(messages: object, tools: object) -> tuple[list[dict], list[Mapping]]:
    messages = [_checked(i, message) for i, message in enumerate(_items("messages", messages))]
    if not messages:
        raise UserError("a chat needs at least one message")
    tools = _items("tools", tools or [])
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise UserError(f"the tool {tool!r:.60} must be an object that declares a function")
    _check_json("tools", tools)
    return messages, tools


def _checked(i: int, message: object) -> dict:
    """A message whose content is one text, or None beside tool calls."""
    where = f"message {i}"
    if not isinstance(message, Mapping):
        raise UserError(f"{where} is {message!r:.60}; must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where} has the role {role!r:.60}; must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("name", ""), str | None):
        raise UserError(f"{where} has the name {message['name']!r:.60}; must be text")
    calls = message.get("tool_calls")
    if calls is not None and role != "assistant":
        raise UserError(f"{where} of the {role} has tool_calls; only an assistant calls tools")
    for call in _items(f"tool_calls of {where}", calls or []):
        _check_call(where, call)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise UserError(f"{where} of a tool must have the tool_call_id of the call it answers")
    content = _joined(where, message.get("content"))
    if content is None and not calls:
        raise UserError(f"{where} of the {role} has no content; must be text")
    return {**message, "content": content}


def _joined(where: str, content: object) -> str | None:
    """The text of a content that may be a list of parts."""
    if content is None or isinstance(content, str):
        return content
    texts = []
    for part in _items(f"content of {where}", content):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise UserError(f"{where} has the part {part!r:.60}; only parts of text are read")
        texts.append(text)
    return "".join(texts)


def _check_call(where: str, call: object) -> None:
    function = call.get("function") if isinstance(call, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or not isinstance(call.get("id"), str)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("arguments"), str | Mapping)
    ):
        raise UserError(
            f'{where} has the tool call {call!r:.60}; must be {{"id", "function": {{"name", '
            '"arguments"}}'
        )
    _check_json(f"the arguments of a tool call of {where}", function["arguments"])


def _items(what: str, value: object) -> list:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise UserError(f"{what} must be a list, not {value!r:.60}")
    return list(value)


def _check_json(what: str, value: object) -> None:
    with refusing(f"{what} cannot be written as JSON", "use objects, lists, text and numbers"):
        json.dumps(value, allow_nan=False, sort_keys=True)


def _strings(value: object) -> Iterator[str]:
    """Every string in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for item in pair for text in _strings(item))
    elif isinstance(value, Sequence):
        yield from (text for item in value for text in _strings(item))


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces of a rendering, unless they grow too long."""
    total = 0
    for piece in pieces:
        total += len(piece)
        _check_size(total)
        yield piece


_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline", default=float("inf"))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    before = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        yield
    finally:
        _deadline.reset(before)


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise UserError(f"the chat template runs for more than {MAX_SECONDS:g} seconds")


def _check_size(size: int) -> None:
    if size > MAX_RENDERED:
        raise UserError(f"the chat template writes more than {MAX_RENDERED} characters")


def _size(value: object) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _checked_size(value):
    _check_size(_size(value))
    return value


_PADDING = {"batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "zfill"}
_WIDE = re.compile(  # a field of many digits or of a width that is an argument
    r"%(\([^)]*\))?[-+ #0]*(\d{6}|\*|\d*\.(\d{6}|\*))|\{[^{}]*:[^{}]*(\d{6}|\{)"
)


def _check_step(name: str, subject: object, args: Iterable) -> None:
    """UserError for a filter or a method that is late or would make its subject too long."""
    _check_time()
    args = list(args)
    if name in _PADDING:
        width = max((a for a in args if isinstance(a, int)), default=0)
        _check_size(width * max(_size(subject), 1))
    elif name == "replace" and isinstance(subject, str):
        old, new = (*args, "", "")[:2]
        if isinstance(old, str):
            _check_size(len(subject) + subject.count(old) * _size(new))
    elif name == "join":
        parts = [x for x in (subject, *args) if isinstance(x, list | tuple)]
        glue = max((len(x) for x in (subject, *args) if isinstance(x, str)), default=0)
        _check_size(sum(_size(x) + glue for part in parts for x in part))
    elif name.startswith("format") and isinstance(subject, str) and _WIDE.search(subject):
        raise UserError("the chat template formats a field of 100000 characters or more")


def _guarded(name: str, function: Callable) -> Callable:
    """A filter that is checked before and after."""
    first = int(hasattr(function, "jinja_pass_arg"))  # it is given an environment or a context

    @functools.wraps(function)
    def run(*args, **options):
        _check_step(name, args[first], (*args[first + 1 :], *options.values()))
        return _checked_size(function(*args, **options))

    return run


def _times(a, b):
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() + b.bit_length() > MAX_BITS:
        raise UserError(f"the chat template computes a product of more than {MAX_BITS} bits")
    _check_size(max(_size(a) * b if isinstance(b, int) else 0,
                    _size(b) * a if isinstance(a, int) else 0))
    return a * b


def _power(a, b):
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * b > MAX_BITS:
        raise UserError(f"the chat template computes a power of more than {MAX_BITS} bits")
    return a**b


def _add(a, b):
    _check_size(_size(a) + _size(b))
    return a + b


def _remainder(a, b):
    _check_step("format", a, ())
    return _checked_size(a % b)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(  # Jinja's own escapes HTML
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys,
    )


def _bounded_environment() -> type:
    """Jinja's sandbox, with the usual ways to much text or time checked.

    Made here, since Jinja is imported only where a template is.
    """
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Compiler(CodeGenerator):
        def visit_Concat(self, node, frame):  # a ~ b ~ c is (a ~ b) ~ c, each checked
            *left, right = node.nodes
            if len(left) > 1:
                inner = nodes.Concat(left, lineno=node.lineno, environment=self.environment)
                node = nodes.Concat(
                    [inner, right], lineno=node.lineno, environment=self.environment
                )
            self.write("environment.checked_size(")
            super().visit_Concat(node, frame)
            self.write(")")

        def visit_For(self, node, frame):
            turn = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
            super().visit_For(node, frame)

    class Environment(ImmutableSandboxedEnvironment):
        code_generator_class = Compiler
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        checked_size = staticmethod(_checked_size)
        check_time = staticmethod(_check_time)

        @staticmethod
        def concat(pieces):
            return "".join(_bounded(pieces))

        def call(self, context, function, /, *args, **options):
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            subject, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            _check_step(str(name), subject, (*args, *options.values()))
            return _checked_size(super().call(context, function, *args, **options))

    return Environment


@functools.lru_cache(maxsize=8)
def _compiled(source: str):
    """A template in the environment that transformers gives to chat templates."""
    need("jinja2", "a chat template")
    from jinja2 import TemplateError

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = _bounded_environment()(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {n: _guarded(n, f) for n, f in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    del environment.globals["lipsum"]  # writes as much as it is asked for
    environment.binop_table |= {"+": _add, "*": _times, "**": _power, "%": _remainder}
    return environment.from_string(source)
