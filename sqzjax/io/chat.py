# SPDX-License-Identifier: Apache-2.0
"""Chat templates from strangers, rendered in a sandbox that cannot hang or exhaust the process.

A template is a jinja2 program found in a checkpoint. jinja2's immutable sandbox stops attribute
tricks, but not long loops, `{{ 10 ** (10 ** 9) }}` or a gigabyte of padding: those run inside one C
call that no in-process guard can interrupt. So templates run in a small worker process with a
memory limit, which is killed when it overruns. Starting the worker costs about 0.2 s once per
template; a rendering after that about a millisecond.

This file is also the worker's program, hence its imports: the standard library, and jinja2 inside
the worker only.
"""

import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_MEMORY_BYTES = 1 << 30
START_SECONDS = 30.0

_log = logging.getLogger(__name__)


class ChatTemplate:
    """A chat template bound to its special tokens; safe to share between threads.

    `variables` (usually `bos_token`, `eos_token`...) are visible to the template, next to
    `messages`, `add_generation_prompt`, `raise_exception` and `strftime_now`, as in Hugging Face
    transformers. A rendering that takes longer than `seconds` or yields more than `max_characters`
    raises `ValueError`; the next one starts a fresh worker.
    """

    def __init__(
        self,
        template: str,
        variables: Mapping[str, Any] | None = None,
        *,
        seconds: float = 0.8,
        max_characters: int = 1 << 22,
    ):
        if len(template) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(
                f"the chat template has {len(template)} characters, more than the limit of "
                f"{MAX_TEMPLATE_CHARACTERS}; it is not a chat template"
            )
        self.template = template
        self.variables = dict(variables or {})
        self.seconds = seconds
        self.max_characters = max_characters
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._close: weakref.finalize[..., ChatTemplate] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """Render a conversation to text; `extra` are further template variables (`tools`...)."""
        check_messages(messages)
        # Templates ask whether the first two are None; undefined, they would not be.
        variables: dict[str, Any] = {"tools": None, "documents": None, **self.variables, **extra}
        variables["messages"] = [dict(m) for m in messages]
        variables["add_generation_prompt"] = add_generation_prompt
        request = {"template": self.template, "variables": variables, "limit": self.max_characters}
        try:
            line = json.dumps({**request, "alarm": 2 * self.seconds})
        except (TypeError, ValueError) as error:
            raise ValueError(f"messages must be JSON-like values: {error}") from error
        with self._lock:
            reply = self._exchange(line)
        if "error" in reply:
            raise ValueError(f"the chat template failed: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        """Stop the worker process; the next rendering starts another."""
        if self._close is not None:
            self._close()
        self._worker = self._close = None

    def _exchange(self, line: str) -> dict[str, Any]:
        worker = self._start() if self._worker is None else self._worker
        answer = _ask(worker, line, self.seconds)
        if answer:
            return json.loads(answer)
        self.close()
        raise ValueError(
            f"the chat template was stopped: it ran longer than {self.seconds} s or used more than "
            f"{MAX_MEMORY_BYTES >> 20} MiB; templates of real models need milliseconds"
        )

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps this folder off sys.path: its module names would shadow installed packages.
        command = [sys.executable, "-P", __file__]
        worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._worker = worker
        self._close = weakref.finalize(self, _stop, worker)
        ready = _ask(worker, "", START_SECONDS)
        if ready != "ready\n":
            self.close()
            raise ValueError(
                "the chat template worker did not start: chat templates need the package jinja2 "
                f"in {sys.executable}; install the extra 'hf'"
            )
        return worker


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Reject conversations that are not a non-empty list of {"role": ..., "content": ...}."""
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            f"messages={messages!r} must be a non-empty list of {{'role': ..., 'content': ...}}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"messages[{index}]={message!r} must be a mapping with a text 'role' "
                "('system', 'user' or 'assistant') and 'content'"
            )


def _ask(worker: subprocess.Popen[str], line: str, seconds: float) -> str:
    """Send one line and read one; empty when the worker died or was killed for being late."""
    timer = threading.Timer(seconds, worker.kill)
    timer.start()
    try:
        assert worker.stdin is not None and worker.stdout is not None
        if line:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
        answer = worker.stdout.readline()
    except OSError:
        return ""
    finally:
        timer.cancel()
    return answer if answer.endswith("\n") else ""


def _stop(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:
            # Unsent bytes of a request to a worker that is gone.
            pass
    worker.wait()


# Everything below runs in the worker process only.


def _environment() -> Any:
    from datetime import datetime

    from jinja2 import TemplateError, ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training; rendering ignores it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _render(compiled: Any, request: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in compiled.generate(**request["variables"]):
        size += len(part)
        if size > request["limit"]:
            raise ValueError(f"its output is longer than {request['limit']} characters")
        parts.append(part)
    return "".join(parts)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the time limit alone protects
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _set_alarm(seconds: float) -> None:
    """Let the kernel end this process if it overruns after its parent was killed."""
    import signal

    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _serve() -> None:
    environment = _environment()
    _limit_memory()
    sys.stdin.reconfigure(encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    compiled = None
    for line in sys.stdin:
        request = json.loads(line)
        _set_alarm(request["alarm"])
        try:
            # Compiling evaluates the stranger's constant expressions, so it is timed too.
            compiled = compiled or environment.from_string(request["template"])
            reply = {"text": _render(compiled, request)}
        except Exception as error:  # whatever a stranger's program raises is the answer
            reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
        _set_alarm(0)


if __name__ == "__main__":
    _serve()
