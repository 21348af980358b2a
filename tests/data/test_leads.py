"""Names of leads and the completion of those that are missing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ecgot.data.leads import (
    COVARIANCE,
    INDEPENDENT_LEADS,
    LIMB_LEADS,
    STANDARD_LEADS,
    complete,
    completion,
    lead_name,
)

SOME_LEADS = st.sets(st.sampled_from(STANDARD_LEADS), min_size=1).map(
    lambda leads: tuple(lead for lead in STANDARD_LEADS if lead in leads)
)


@pytest.mark.parametrize("lead", STANDARD_LEADS)
@pytest.mark.parametrize("prefix", ["", "Lead ", "LEAD_", "ECG ", "ECG_", "ecg-", "EKG ", "MDC_ECG_LEAD_"])
def test_prefixes_and_case_change_nothing(lead, prefix):
    for spelled in (lead, lead.upper(), lead.lower(), f" {lead} "):
        assert lead_name(f"{prefix}{spelled}") == lead


@pytest.mark.parametrize(
    ("name", "lead"),
    [
        *[(f"C{number}", f"V{number}") for number in range(1, 7)],
        *[("DI", "I"), ("DII", "II"), ("DIII", "III"), ("D1", "I"), ("L2", "II"), ("L III", "III")],
        *[("MLII", "II"), ("MLIII", "III"), ("ML II", "II"), ("V_1", "V1"), ("V 6", "V6"), ("a VR", "aVR")],
    ],
)
def test_other_spellings(name, lead):
    assert lead_name(name) == lead


@pytest.mark.parametrize(
    "name",
    [
        "-aVR",
        "−aVR",
        "aVR-",
        "V7",
        "V3R",
        "V1-V2",
        "I-II",
        "II-III",
        "I+II",
        "Vx",
        "PLETH",
        "ECG",
        "RESP",
        "",
        "V0",
    ],
)
def test_what_is_none_of_the_twelve_keeps_its_name(name):
    assert lead_name(name) == name


def test_spaces_around_an_unknown_name_go():
    assert lead_name("  ABP ") == "ABP"


@given(SOME_LEADS)
def test_leads_that_are_there_stay_and_are_not_listed(present):
    how = completion(present)
    rows = [STANDARD_LEADS.index(lead) for lead in present]
    np.testing.assert_array_equal(how.matrix[rows], np.eye(len(present)))
    assert sorted((*present, *how.derived, *how.estimated)) == sorted(STANDARD_LEADS)
    assert np.abs(how.matrix).max() < 20  # no noise is blown up


@given(SOME_LEADS, st.integers(0, 99))
def test_derived_leads_are_exact(present, seed):
    everything, _ = complete(np.random.default_rng(seed).normal(size=(8, 50)), INDEPENDENT_LEADS)
    rows = [STANDARD_LEADS.index(lead) for lead in present]
    twelve, how = complete(everything[rows], present)
    for lead in how.derived:
        row = STANDARD_LEADS.index(lead)
        np.testing.assert_allclose(twelve[row], everything[row], atol=1e-6)
    limbs = [lead for lead in present if lead in LIMB_LEADS]
    missing = {*LIMB_LEADS} - {*present}
    assert set(how.derived) == (missing if len(limbs) >= 2 else set())


@given(SOME_LEADS)
def test_what_an_estimate_misses_has_nothing_to_do_with_what_is_there(present):
    """It is the best linear one: cov(x - M p, p) = 0 under the covariance of the training set."""
    covariance = np.loadtxt(COVARIANCE, delimiter=",", skiprows=1)
    whole, _ = complete(np.eye(8), INDEPENDENT_LEADS)
    some = whole[[STANDARD_LEADS.index(lead) for lead in present]]
    missed = whole - completion(present).matrix @ some
    np.testing.assert_allclose(missed @ covariance @ some.T, 0, atol=1e-7)


def test_einthoven_and_goldberger():
    one, two = np.random.default_rng(0).normal(size=(2, 50))
    twelve, how = complete(np.stack([one, two]), ("I", "II"))
    by_name = dict(zip(STANDARD_LEADS, twelve, strict=True))
    np.testing.assert_allclose(by_name["III"], two - one, atol=1e-7)
    np.testing.assert_allclose(by_name["aVR"], -(one + two) / 2, atol=1e-7)
    np.testing.assert_allclose(by_name["aVL"], one - two / 2, atol=1e-7)
    np.testing.assert_allclose(by_name["aVF"], two - one / 2, atol=1e-7)
    assert how.derived == ("III", "aVR", "aVL", "aVF")
    assert how.estimated == STANDARD_LEADS[6:]
