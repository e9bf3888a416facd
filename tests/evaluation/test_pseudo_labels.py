"""What an ensemble's votes become, and how it is told; with networks in tests/cli/test_pseudo_label.py."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.pseudo_labels import as_stored, likeliest
from nnunet_ssl.evaluation.pseudo_label_report import describe, rounds_table, table
from nnunet_ssl.evaluation.pseudo_labels import Ensemble, Rule
from nnunet_ssl.testing.tiny import make_dataset_json, make_labels, make_plans

STRUCTURES = {"structure 1": 1, "structure 2": 2}


def ensemble_of(votes: list[np.ndarray], sure: float = 0.9) -> Ensemble:
    """Networks with these label maps, which give them this probability, and the others the rest."""
    made = Ensemble.__new__(Ensemble)
    made.labels = PlansManager(make_plans((4, 4))).get_label_manager(make_dataset_json(make_labels(3)))
    single = [np.stack([np.where(v == k, sure, (1 - sure) / 2) for k in range(3)]) for v in votes]
    made.vote = lambda image: (np.mean(single, 0).astype(np.float32), votes)
    return made


def row(*labels: int) -> np.ndarray:
    return np.array([[labels]], np.int16)


def test_where_one_of_three_sure_networks_disagrees_a_voxel_is_uncertain_by_default():
    votes = [row(1, 1, 1, 1, 0, 2), row(1, 1, 1, 1, 0, 2), row(1, 1, 1, 0, 0, 2)]
    stored, scores = ensemble_of(votes, sure=1.0).label(None, STRUCTURES, Rule())
    np.testing.assert_array_equal(likeliest(stored), row(1, 1, 1, 1, 0, 2))
    np.testing.assert_array_equal(stored < 0, row(0, 0, 0, 1, 0, 0) > 0)
    assert scores["kept"]
    assert scores["why"] == ""
    assert scores["uncertain"] == pytest.approx(1 / 6, abs=1e-5)
    assert scores["agreement"]["structure 2"] == 1.0


def test_a_doubted_structure_does_not_count_wherever_any_network_or_the_round_before_sees_it():
    votes = [row(1, 1, 1, 1, 2, 0, 0, 0), row(1, 1, 1, 1, 0, 2, 0, 0), row(1, 1, 1, 1, 0, 0, 0, 0)]
    rule = Rule(certain_from=0.0)
    stored, scores = ensemble_of(votes).label(None, STRUCTURES, rule)
    np.testing.assert_array_equal(stored, row(1, 1, 1, 1, -1, -1, 0, 0))
    assert (scores["kept"], scores["why"]) == (True, "doubted: structure 2")

    previous = as_stored(row(1, 1, 1, 1, 0, 0, 2, 0), np.zeros((1, 1, 8), bool))
    stored, scores = ensemble_of(votes).label(None, STRUCTURES, rule, previous)
    np.testing.assert_array_equal(stored, row(1, 1, 1, 1, -1, -1, -1, 0))
    assert scores["unchanged"] == {"structure 1": 1.0, "structure 2": 0.0, "all": pytest.approx(8 / 9, abs=1e-5)}


def test_what_was_uncertain_in_the_round_before_is_not_compared():
    votes = [row(1, 1, 0, 0), row(1, 1, 0, 0)]
    previous = as_stored(row(1, 0, 1, 0), row(0, 1, 1, 0) > 0)
    _, scores = ensemble_of(votes).label(None, STRUCTURES, Rule(), previous)
    assert scores["unchanged"] == {"structure 1": 1.0, "structure 2": None, "all": 1.0}


# ---- how it is told -----------------------------------------------------------------------------------------------


def case(kept: bool, why: str, overall: float | None, unchanged: float | None = None) -> dict:
    agreed = None if overall is None else {"one": None, "all": overall}
    return {"kept": kept, "why": why, "agreement": agreed, "uncertain": 0.02,
            "unchanged": None if unchanged is None else {"one": 0.5, "all": unchanged}}  # fmt: skip


MANIFEST = {
    "name": "round_2",
    "cases": {
        "a": case(True, "", 0.9, 0.8),
        "b": case(True, "doubted: one", 0.8, 0.9),
        "c": case(False, "agreement 0.312, less than 0.7", 0.312, 0.9),
        "d": case(False, "agreement 0.412, less than 0.7", 0.412, 0.9),
        "e": case(False, "no structure was found", None),
    },
}


def test_people_are_told_what_is_kept_and_why_others_are_not():
    assert describe(MANIFEST) == [
        "round_2: 2 of 5 cases kept",
        "  dropped: 2 (agreement less than 0.7)",
        "  dropped: 1 (no structure was found)",
        "  1 of those kept have structures that do not count",
        "  agreement of the networks (Dice): median 0.606, least 0.312",
        "  agreement with the round before (Dice): median 0.900, least 0.800",
        "  uncertain voxels: 2.00 %",
    ]
    last = rounds_table([MANIFEST]).splitlines()[-1]
    assert last == ("| round_2 | 2 | 2: agreement less than 0.7; 1: no structure was found | 0.606 | 0.900 | 2.00 % |")


def test_the_table_has_a_row_per_case_and_a_column_per_score():
    rows = list(csv.DictReader(io.StringIO(table(MANIFEST).decode())))
    assert [r["case"] for r in rows] == list("abcde")
    assert rows[2] == {
        "case": "c", "kept": "False", "why": "agreement 0.312, less than 0.7", "uncertain": "0.02",
        "agreement all": "0.312", "agreement one": "", "unchanged all": "0.9", "unchanged one": "0.5",
    }  # fmt: skip
    assert rows[4]["agreement all"] == ""
