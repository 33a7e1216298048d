"""Accuracy as an `evaluate` metric that needs no download (the stock one lives on the Hub)."""

import datasets
import evaluate
import numpy

_DESCRIPTION = "Share of predictions that equal their reference."
_INPUTS = """
Args:
    predictions: class numbers.
    references: class numbers, as many.
Returns:
    accuracy: in [0, 1].
"""


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(numpy.mean(numpy.equal(predictions, references)))}
