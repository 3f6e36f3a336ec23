"""Make the example data: images of handwritten digits, and a classifier's logits for those it has not seen.

The images are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://archive.ics.uci.edu/dataset/80, licensed CC BY 4.0, as scikit-learn ships it: 1797 of 8 x 8
pixels, from 0 to 16. Only the file format was changed; the logits and targets are made from them.

Run as ``python make_digits.py [FOLDER]``; without a folder the files land beside this script.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent

images, digits = load_digits(return_X_y=True)
np.savez_compressed(folder / "digits.npz", images=images.astype(np.uint8), targets=digits.astype(np.int64))
train_images, test_images, train_digits, test_digits = train_test_split(
    images / 16, digits, test_size=0.5, random_state=0, stratify=digits
)

# The default L2 penalty gives one best fit and keeps it from being too sure of itself; the tight
# tolerance reaches it to 4 decimals whatever the linear algebra library beneath.
classifier = LogisticRegression(tol=1e-8, max_iter=1000).fit(train_images, train_digits)

logits = classifier.decision_function(test_images).astype(np.float32)
targets = test_digits.astype(np.int64)
np.save(folder / "digits_logits.npy", logits)
np.save(folder / "digits_targets.npy", targets)

accuracy = np.mean(logits.argmax(axis=1) == targets)
print(f"{len(logits)} rows of {logits.shape[1]} logits, accuracy {accuracy:.4f}, in {folder}")
