"""Log-probabilities and perplexity of sentences, under a language model that counts pairs of letters."""

import numpy as np

import pylogits

# The beginning of Alice's Adventures in Wonderland, by Lewis Carroll.
TEXT = """\
alice was beginning to get very tired of sitting by her sister on the bank and of having nothing to do once or twice she
had peeped into the book her sister was reading but it had no pictures or conversations in it and what is the use of a
book thought alice without pictures or conversations"""
SENTENCES = ["her sister had a book", "nothing to do", "jazz quiz"]

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
PADDING = -100  # No letter has this number: whoever forgets ignore_index gets an error, not a wrong mean.


def encode(text):
    """The numbers of the letters, with a space before the first and after the last word."""
    return np.array([ALPHABET.index(letter) for letter in f" {' '.join(text.split())} "])


# Each pair starts with a count of 1, so that a pair which the text lacks is unlikely, not impossible.
counts = np.ones((len(ALPHABET), len(ALPHABET)))
letters = encode(TEXT)
np.add.at(counts, (letters[:-1], letters[1:]), 1)

# Each letter but the last predicts the next. Short rows are padded; what the padded inputs are doesn't matter.
rows = [encode(sentence) for sentence in SENTENCES]
lengths = np.array([len(row) - 1 for row in rows])
inputs = np.zeros((len(rows), lengths.max()), np.int64)
targets = np.full_like(inputs, PADDING)
for i, row in enumerate(rows):
    inputs[i, : lengths[i]] = row[:-1]
    targets[i, : lengths[i]] = row[1:]

# Logs of counts are logits as they stand: dividing by the sum of the counts is what softmax does.
logits = np.log(counts)[inputs]

# A token's loss is minus its log-probability, and that of padding is 0: sums over a row are those of the sentence.
losses = pylogits.cross_entropy(logits, targets, ignore_index=PADDING, reduction="none")
log_probabilities = -losses.sum(axis=1)

# The mean is over tokens that are there. losses.mean() would count the padding too, and flatter the model.
mean = pylogits.cross_entropy(logits, targets, ignore_index=PADDING)

print(f"logits {logits.shape}, losses {losses.shape}, of which {lengths.sum()} count\n")
print(f"log-probability of each letter of {SENTENCES[-1]!r}, and of the space that ends it:")
print(-losses[-1, : lengths[-1]].round(2), "\n")
print("log-probability  tokens  perplexity")
for sentence, log_probability, length in zip(SENTENCES, log_probabilities, lengths, strict=True):
    print(f"{log_probability:15.4f}  {length:6}  {np.exp(-log_probability / length):10.4f}  {sentence}")
print(f"\nmean loss {mean:.6f} nats a token, perplexity {np.exp(mean):.6f}; a blind guess has {len(ALPHABET)}")
print(f"with the padding in the mean, wrongly: {np.exp(losses.mean()):.6f}")
