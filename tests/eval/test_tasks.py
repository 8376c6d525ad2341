# SPDX-License-Identifier: Apache-2.0
"""Generation tasks with a scripted model: prompts, judging, resuming, bad files."""

import json

import pytest

from eval import tasks
from eval.config import Extraction, FewShot, Generation
from sqzjax.decode.sampling_config import SamplingConfig
from sqzjax.errors import ConfigError, DataError
from sqzjax.io import tokenizer as tokenizers

BYTES = tokenizers.load("bytes")
GOOD = '{"question": "a", "answer": "1"}'


class Scripted:
    """Answers from a function of the prompt's text and remembers what it was asked."""

    tokenizer = BYTES
    fingerprint = "scripted"

    def __init__(self, answer):
        self.answer, self.batches, self.fail_after = answer, [], None

    def generate(self, prompts, sampling, *, row_ids, truncate="never", usage=None):
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise RuntimeError("interrupted")
        self.batches.append(list(row_ids))
        return [self.answer(BYTES.decode(prompt)) for prompt in prompts]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def sums(tmp_path):
    rows = [
        {"question": f"{a} + {b}?", "answer": f"Adding.\n#### {a + b:,}"}
        for a, b in [(1, 2), (1000, 234), (5, 5), (40, 2), (7, 7)]
    ]
    return write(tmp_path / "sums.jsonl", rows)


def solve(prompt: str) -> str:
    a, b = prompt.rsplit("Question: ", 1)[1].split("?")[0].split(" + ")
    return f" The sum is {int(a) + int(b)}.0" if a != "40" else " I do not know"


def run(task, model, folder, **options):
    settings = {"batch_size": 2, "seed": 0} | options
    return tasks.run(task, model, samples_file=folder / "samples.jsonl", **settings)


def task_for(data, **options):
    return Generation(data=data, extract=Extraction(kind="numeric"), **options)


def test_answers_are_compared_and_every_sample_is_written(sums, tmp_path):
    result = run(task_for(sums), Scripted(solve), tmp_path)
    assert (result["correct"], result["questions"], result["without_answer"]) == (4, 5, 1)
    assert result["accuracy"] == 0.8
    low, high = result["interval_95"]
    assert low < 0.8 < high
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    by_index = {line["index"]: line for line in lines}
    assert sorted(by_index) == [0, 1, 2, 3, 4]
    assert by_index[1]["gold"] == by_index[1]["extracted"] == "1234"
    assert by_index[1]["prompt"] == "Question: 1000 + 234?\nAnswer:"
    assert by_index[3]["extracted"] is None and not by_index[3]["correct"]


def test_interrupted_task_continues_where_it_stopped(sums, tmp_path):
    model = Scripted(solve)
    model.fail_after = 1
    with pytest.raises(RuntimeError, match="interrupted"):
        run(task_for(sums), model, tmp_path)
    # A line torn by a kill must not matter.
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"index": 3, "pro')
    again = Scripted(solve)
    result = run(task_for(sums), again, tmp_path)
    assert result["correct"] == 4
    asked = [index for batch in model.batches + again.batches for index in batch]
    assert sorted(asked) == [0, 1, 2, 3, 4]
    final = Scripted(solve)
    assert run(task_for(sums), final, tmp_path) == result
    assert final.batches == []


def test_other_settings_or_weights_do_not_reuse_samples(sums, tmp_path):
    run(task_for(sums), Scripted(solve), tmp_path)
    model = Scripted(solve)
    run(task_for(sums, sampling=SamplingConfig(max_new_tokens=3)), model, tmp_path)
    assert sum(map(len, model.batches)) == 5
    model.fingerprint, model.batches = "other weights", []
    run(task_for(sums, sampling=SamplingConfig(max_new_tokens=3)), model, tmp_path)
    assert sum(map(len, model.batches)) == 5


def test_solved_examples_come_first_and_never_the_question(sums, tmp_path):
    task = task_for(sums, few_shot=FewShot(data=sums, count=2), limit=2)
    rows = tasks.read_jsonl(tmp_path / "sums.jsonl", 2)
    first, second = tasks.build_prompts(task, rows, seed=0)
    assert first.startswith(
        "Question: 1000 + 234?\nAnswer: Adding.\n#### 1,234\n\nQuestion: 5 + 5?"
    )
    assert first.endswith("\n\nQuestion: 1 + 2?\nAnswer:")
    assert second.startswith("Question: 1 + 2?\nAnswer: Adding.\n#### 3\n\nQuestion: 5 + 5?")
    drawn = task_for(sums, few_shot=FewShot(data=sums, count=2, order="random"))
    assert tasks.build_prompts(drawn, rows, 1) == tasks.build_prompts(drawn, rows, 1)
    assert len({p for seed in range(20) for p in tasks.build_prompts(drawn, rows[:1], seed)}) > 3
    with pytest.raises(DataError, match="4 usable examples"):
        tasks.build_prompts(task_for(sums, few_shot=FewShot(data=sums, count=5)), rows, 0)


def test_gold_may_be_read_in_another_way(tmp_path):
    data = write(tmp_path / "q.jsonl", [{"question": "Sky?", "answer": "It is BLUE"}])
    task = Generation(
        data=data, gold=Extraction(kind="regex", pattern=r"is (\w+)"), extract=Extraction()
    )
    assert run(task, Scripted(lambda prompt: " blue "), tmp_path)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"q": "b", "answer": "2"}'], r"line 2: no field 'question'"),
        ([GOOD, "", '{"question": "b"}'], r"line 3: no answer field 'answer'"),
        (['{"question": "a", "answer": "many"}'], r"line 1: no gold answer found in 'many'"),
        ([GOOD, "{broken"], r"line 2: not valid JSON"),
        (['["a"]'], r"line 1: must be a JSON object"),
        (["[" * 100_000], r"line 1: not valid JSON"),
        (["", "  "], "holds no line of JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        run(task_for(str(path)), Scripted(lambda prompt: "1"), tmp_path)


def test_missing_file_and_bad_encoding_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl"):
        tasks.read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        tasks.read_jsonl(tmp_path / "latin.jsonl")


@pytest.mark.parametrize("field", ["question.__class__", "question[0]", "", "0x!"])
def test_templates_reach_only_fields(field):
    with pytest.raises((ConfigError, DataError)):
        tasks.fill("{" + field + "}", {"question": "q"}, "file")


def test_templates_keep_doubled_braces():
    assert tasks.fill("{{x}} {a}", {"a": 1}, "file") == "{x} 1"


def test_empty_prompt_is_refused():
    with pytest.raises(DataError, match="prompt is empty"):
        tasks.encode(BYTES, "")


def test_generated_text_of_a_real_model_is_judged(tiny, tmp_path):
    """The loop works with a real model; stop strings and special tokens stay out of the text."""
    data = write(tmp_path / "q.jsonl", [{"question": "x" * n, "answer": "1"} for n in (3, 9, 5)])
    task = Generation(data=data, sampling=SamplingConfig(max_new_tokens=4))
    result = run(task, tiny, tmp_path)
    assert result["questions"] == 3
    alone = tiny.generate(
        [BYTES.encode("Question: xxxxxxxxx\nAnswer:")], task.sampling, row_ids=[1]
    )
    assert alone[0] in [example["output"] for example in result["examples"]]
