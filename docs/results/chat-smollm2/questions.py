"""Questions for `hypenet answer`, out of a corpus: python questions.py train-00.parquet 6000 questions.jsonl

Of words that a dictionary explains, of passages to be summed up, rewritten or asked about, and of subjects to write on.
The same file and number give the same questions.
"""

import json
import random
import re
import sys

import pyarrow.parquet as parquet

WORDS = (
    "What does the word \"{}\" mean?", "Use the word \"{}\" in a sentence.", "Explain \"{}\" to a child.",
    "Write a short poem about {}.", "Give me three facts about {}.", "Write a short story about {}.",
    "What would you tell a friend about {}?", "List five things that have to do with {}.",
)  # fmt: skip
PASSAGES = (
    "Sum up the following text in one sentence.\n\n{}", "What is the following text about?\n\n{}",
    "Rewrite the following text in simple words.\n\n{}", "Give the following text a title.\n\n{}",
    "Which question does the following text answer?\n\n{}",
)  # fmt: skip


def main(corpus: str, count: str, out: str) -> None:
    draw = random.Random(0)
    rows = parquet.read_table(corpus).to_pylist()
    headwords = sorted(
        {
            word
            for row in rows
            if row["source"] == "wordnet_glosses"
            for word in re.findall(r"^(\w[\w ]+) \(noun\)", row["text"], re.M)
        }
    )
    prose = [row["text"] for row in rows if row["kind"] != "dictionary"]
    with open(out, "w") as file:
        written = 0
        while written < int(count):
            if draw.random() < 0.6:
                question = draw.choice(WORDS).format(draw.choice(headwords))
            else:
                paragraphs = [p.strip() for p in draw.choice(prose).split("\n\n") if 200 < len(p) < 900]
                if not paragraphs:
                    continue
                question = draw.choice(PASSAGES).format(draw.choice(paragraphs))
            written += 1
            file.write(json.dumps({"messages": [{"role": "user", "content": question}]}, ensure_ascii=False) + "\n")


main(*sys.argv[1:])
