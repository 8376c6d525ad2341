# SPDX-License-Identifier: Apache-2.0
"""Reliability case 24: chat templates from strangers stop within a second and reach nothing."""

import threading
import time

import jaxtyping
import pytest

from sqzjax.io.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": "Grüße\n"}]
# Rendering is stopped after 0.8 s; the rest of the second is for starting the worker, and the
# factor for machines under load.
LIMIT_SECONDS = 3.0

HOSTILE = {
    "long range": "{% for i in range(10**12) %}x{% endfor %}",
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "huge power": "{{ (10 ** (10 ** 9)) % 7 }}",
    "huge power of variables": "{% set n = 10 %}{{ n ** (n ** n) }}",
    "huge text": "{{ 'a' * 10**10 }}",
    "huge padding": "{{ '%1000000000d' % 1 }}",
    "huge filter": "{{ 'x' | center(10**10) }}",
    "endless output": "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "class tricks": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format tricks": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "joiner globals": "{{ self.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% for %}",
    "refusal": "{{ raise_exception('roles must alternate') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_template_is_stopped(name: str):
    template = ChatTemplate(HOSTILE[name])
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"the chat template (failed|was stopped)"):
        template.render(MESSAGES)
    assert time.perf_counter() - started < LIMIT_SECONDS
    template.close()


def test_the_next_rendering_works():
    loops = HOSTILE["nested loops"]
    template = ChatTemplate("{% if not stop %}" + loops + "{% endif %}{{ word }}")
    with pytest.raises(ValueError, match="was stopped"):
        template.render(MESSAGES)
    assert template.render(MESSAGES, stop=True, word="fine") == "fine"
    assert template.render(MESSAGES, stop=True, word="again") == "again"
    template.close()


def test_stops_off_the_main_thread():
    outcome: list[object] = []

    def work() -> None:
        try:
            outcome.append(ChatTemplate(HOSTILE["nested loops"]).render(MESSAGES))
        except ValueError as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert len(outcome) == 1 and isinstance(outcome[0], ValueError)


def test_renders_like_transformers():
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if loop.first %}[{{ m['content'] | trim }}]{% else %}{% break %}{% endif %}\n"
        "{% endfor %}\n"
        "{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = ChatTemplate(template, {"bos_token": "<s>"})
    both = [*MESSAGES, {"role": "assistant", "content": "<b>"}]
    text = '<s>[Grüße][{"role": "user", "content": "Grüße\\n"}, ' + (
        '{"role": "assistant", "content": "<b>"}]'
    )
    assert chat.render(both, add_generation_prompt=False) == text
    assert chat.render(both) == text + "<assistant>"
    chat.close()
    chat.close()


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "text",
        {"role": "user"},
        [1],
        [{"content": "x"}],
        [{"role": 1}],
        [{"role": "user", "x": {1}}],
    ],
)
def test_bad_messages(messages: object, monkeypatch: pytest.MonkeyPatch):
    # Users do not have the type checks of the test run.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="messages"):
        ChatTemplate("x").render(messages)  # pyright: ignore[reportArgumentType]


def test_oversized_template():
    with pytest.raises(ValueError, match="more than the limit"):
        ChatTemplate("x" * (2 << 20))
