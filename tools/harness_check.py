"""Run lm-evaluation-harness on an artifact offline, with local tasks, and check its figures.

    python tools/harness_check.py out        # needs pip install -e '.[harness]'

Three tasks are written to a temporary folder, with texts of the bundled held-out text: a choice of
endings, perplexity by rolling windows, and generation until a stop string. What the harness reports
is compared with the same figures computed here from the logits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1")

import carve_runtime
import numpy as np
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import carve.harness  # noqa: F401  # registers the model
from carve.calibration import read_text

_DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
test_split: test
task: {name}
"""
_TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{endings}}"
target_delimiter: ""
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "local_until": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], do_sample: false, max_gen_toks: 24}
metric_list: [{metric: exact_match}]
""",
}


def log_probability(model: carve_runtime.Model, ids: list[int], scored: int) -> float:
    """Of the last ``scored`` tokens."""
    rows = model.logits(ids[:-1])[-scored:].astype(np.float64)
    rows -= np.logaddexp.reduce(rows, axis=1, keepdims=True)
    return float(rows[np.arange(scored), ids[-scored:]].sum())


def documents(text: str, model: carve_runtime.Model) -> dict[str, list[dict[str, Any]]]:
    """The tasks' documents; ``answer`` is what the model itself says, for every second one."""
    pieces = [" ".join(p.split()) for p in text.split("\n\n")]
    pieces = [p for p in pieces if 30 <= len(p.split()) <= 80][:16]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in _TASKS}
    for i, piece in enumerate(pieces):
        words = piece.split()
        start, end = " ".join(words[:20]), " " + " ".join(words[20:26])
        other = " " + " ".join(pieces[(i + 1) % len(pieces)].split()[20:26])
        endings = [end, other] if i % 2 else [other, end]
        found["local_choice"].append({"text": start, "endings": endings, "label": i % 2 == 0})
        found["local_rolling"].append({"text": piece})
        answer = model.generate(start, max_new_tokens=24, stop=["."]).text if i % 2 else "no"
        found["local_until"].append({"text": start, "answer": answer})
    for each in found["local_choice"]:
        each["label"] = int(each["label"])
    return found


def expected(docs: dict[str, list[dict[str, Any]]], model: carve_runtime.Model) -> dict[str, float]:
    """The three figures, from the logits."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    right = 0
    for doc in docs["local_choice"]:
        start = tokenizer.encode(doc["text"]).ids
        whole = [tokenizer.encode(doc["text"] + e).ids for e in doc["endings"]]
        scores = [log_probability(model, ids, len(ids) - len(start)) for ids in whole]
        right += int(np.argmax(scores)) == doc["label"]
    total, words = 0.0, 0
    info = model.manifest.model
    prefix = info.bos_token_id if info.bos_token_id is not None else info.eos_token_ids[0]
    for doc in docs["local_rolling"]:
        ids = tokenizer.encode(doc["text"]).ids
        total += log_probability(model, [prefix, *ids], len(ids))
        words += len(doc["text"].split())
    same = sum(
        model.generate(d["text"], max_new_tokens=24, stop=["."]).text == d["answer"]
        for d in docs["local_until"]
    )
    return {
        "local_choice": right / len(docs["local_choice"]),
        "local_rolling": math.exp(-total / words),
        "local_until": same / len(docs["local_until"]),
    }


def main() -> int:
    """Print the harness's figures beside those computed here; returns 1 where they differ."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("artifact")
    args = p.parse_args()
    model = carve_runtime.load(args.artifact)
    docs = documents(read_text(None, "evaluation.txt"), model)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        for name, task in _TASKS.items():
            lines = "\n".join(json.dumps(d) for d in docs[name])
            Path(folder, f"{name}.jsonl").write_text(lines, "utf-8")
            Path(folder, f"{name}.yaml").write_text(
                _DATA.format(folder=folder, name=name) + task, "utf-8"
            )
        found = simple_evaluate(
            model="carve",
            model_args=f"path={args.artifact}",
            tasks=list(_TASKS),
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
    wrong = 0
    for name, want in expected(docs, model).items():
        result = found["results"][name]
        metric, got = next((k, v) for k, v in result.items() if k.endswith(",none"))
        differs = not math.isclose(got, want, rel_tol=1e-5)
        wrong += differs
        print(f"{name:14} {metric:22} {got:.6f}  here {want:.6f}{'  DIFFERS' if differs else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
