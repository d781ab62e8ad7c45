"""How fast the world is drawn: pictures a second on one core, questions, evidence and masks included.

python -m benchmarks.world [--size 96] [--questions 8] [--n 300] [--json]
"""

from __future__ import annotations

import argparse
import json
import time

from vistok.world import TASKS, patch_labels, sample

TARGET = 150.0


def measure(task: str, n: int, size: int, questions: int) -> dict[str, float | int | str]:
    """Processor seconds (all threads) for n pictures of a task that no earlier picture has warmed up."""
    list(sample(task, 20, seed=1, size=size, questions=questions))
    start = time.process_time()
    pictures = list(sample(task, n, seed=2, size=size, questions=questions))
    drawn = time.process_time()
    asked = sum(len(p.questions) for p in pictures)
    seen = time.process_time()
    for picture in pictures:
        patch_labels(picture, max(1, size // 8))
    labelled = time.process_time()
    return {
        "task": task,
        "size": size,
        "n": n,
        "questions_per_picture": asked / n,
        "pictures_per_second": n / (seen - start),
        "labels_milliseconds": 1000 * (labelled - seen) / n,
        "draw_milliseconds": 1000 * (drawn - start) / n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    rows = [measure(task, arguments.n, arguments.size, arguments.questions) for task in TASKS]
    for row in rows:
        if arguments.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['task']:8} {row['size']} px  {row['pictures_per_second']:7.0f} pictures/s/core"
                f"  {row['questions_per_picture']:.1f} questions each  labels {row['labels_milliseconds']:.2f} ms"
            )
    if not arguments.json:
        slowest = min(float(row["pictures_per_second"]) for row in rows)
        print(f"slowest task / target of {TARGET:.0f}: {slowest / TARGET:.1f}x")


if __name__ == "__main__":
    main()
