"""What ends a statement, and what ends a sentence."""

import pytest

from ecgot.text.statements import sentence_spans, sentences, statements


def test_a_report_is_cut_into_its_statements():
    assert statements("sinus rhythm. left axis; st-t: 4.3 mv. ") == [
        "sinus rhythm",
        "left axis",
        "st-t",
        "4.3 mv",
    ]


@pytest.mark.parametrize("text", ["", " . ", ";"])
def test_a_text_without_words_is_one_statement(text):
    assert statements(text) == [text.strip()]


def test_a_sentence_ends_at_a_full_stop_alone():
    text = "sinus rhythm. left axis; st-t: 4.3 mv. qtc 0.45 s.. normal ecg"
    assert sentences(text) == ["sinus rhythm", "left axis; st-t: 4.3 mv", "qtc 0.45 s.", "normal ecg"]
    assert [text[start:stop] for start, stop in sentence_spans(text)] == sentences(text)


def test_a_text_without_words_has_no_sentence():
    assert sentences(" . ") == []
