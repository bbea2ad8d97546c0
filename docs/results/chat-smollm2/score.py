"""Models on the assistant's words of conversations: python score.py teacher-answers.jsonl NAME=MODEL ..

Prints, for each model, the mean loss in nats a token and how many tokens are its likeliest.
"""

import sys

import numpy as np

from hypenet_jax import hub
from hypenet_jax.data.chat import encode_conversation
from hypenet_jax.data.sources import read_documents
from hypenet_jax.evals.token_nll import token_nll

LENGTH, ROWS = 1024, 16


def main(conversations: str, *models: str) -> None:
    for name, _, source in (given.partition("=") for given in models):
        model, params = hub.load(source)
        loss, likeliest, count = 0.0, 0, 0
        encoded = [
            encode_conversation(model.tokenizer, document.conversation) for document in read_documents(conversations)
        ]
        for start in range(0, len(encoded), ROWS):
            tokens = np.zeros((ROWS, LENGTH + 1), np.int32)
            said = np.zeros((ROWS, LENGTH + 1), bool)
            segments = np.full((ROWS, LENGTH), -1, np.int32)
            for row, (ids, written) in enumerate(encoded[start : start + ROWS]):
                ids, written = ids[: LENGTH + 1], written[: LENGTH + 1]
                tokens[row, : len(ids)], said[row, : len(ids)], segments[row, : len(ids) - 1] = ids, written, 0
            nll, right = token_nll(model, params, tokens[:, :-1], tokens[:, 1:], segments)
            loss += float((np.asarray(nll) * said[:, 1:]).sum())
            likeliest += int((np.asarray(right) & said[:, 1:]).sum())
            count += int(said[:, 1:].sum())
        words = f"{count:,} tokens of {len(encoded)} answers"
        print(f"{name}: {loss / count:.4f} nats a token, {likeliest / count:.1%} likeliest, {words}")


main(*sys.argv[1:])
