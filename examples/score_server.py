"""A scoring service: rows of logits in, as JSON, and predictions, confidences and entropies out.

Run as ``uvicorn score_server:app --workers 2``, in this folder. Each worker is a process with a pool of threads, on which
FastAPI runs `score`: pylogits computes without the interpreter's lock, and so do these threads, side by side.
"""

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

import pylogits

app = FastAPI()


class Rows(BaseModel):
    logits: list[list[float]]
    temperature: float = 1.0


class Answer(BaseModel):
    prediction: list[int]
    confidence: list[float]
    entropy: list[float]


@app.post("/score")
def score(rows: Rows) -> Answer:
    try:
        scores = pylogits.score(np.array(rows.logits), temperature=rows.temperature)
    except ValueError as error:  # says which argument is wrong, and where
        raise HTTPException(422, str(error)) from error
    return Answer(**{name: getattr(scores, name).tolist() for name in Answer.model_fields})
