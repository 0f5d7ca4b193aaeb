import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from dht.report import render_page

HOSTILE = "</script><img src=x onerror=alert(1)><!--\u2028 &amp; {{ 7*7 }}"


class Elements(HTMLParser):
    """Tags with their attributes, and the text of each script, as a browser would split them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.words, self._inside = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def payload(page):
    return json.loads(Elements(page).scripts[0])


@pytest.fixture
def page(report, samples, points, history, meta):
    return render_page(report, samples, points, history, meta)


def test_headlines_say_the_figure_and_what_it_is_compared_with(page):
    text = Elements(page).text
    for words in (
        "Accuracy 90.1% dense 91.5%, 1.4 points lower",
        "Inference compute 26.3% of the dense model’s FLOPs, budget 26.0%",
        "Inference time 34.1% of the dense model’s: 1.23 s against 3.62 s",
        "Training compute 41.2% of dense FLOPs; time 46.7%, 131 s against 281 s",
    ):
        assert words in text


def test_nothing_is_loaded_from_anywhere(page):
    elements = Elements(page)
    loading = {"src", "href", "srcset", "action", "poster", "data", "xlink:href", "background"}
    assert not [(tag, name) for tag, attributes in elements.tags for name in attributes if name in loading]
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in elements.tags}
    assert not re.findall(r"(?i)url\(|@import|fetch\(|XMLHttpRequest|import\(", page)
    assert set(re.findall(r"[a-z]+://[^\s\"']*", page)) == {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_pictures_in_the_page_are_well_formed(page):
    pictures = re.findall(r"<svg .*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        ET.fromstring(picture)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_three_hundred_samples_stay_under_a_megabyte(page):
    assert len(page.encode()) < 1_000_000


def test_hostile_text_never_becomes_markup(samples, report):
    report["policy"] = report[HOSTILE] = HOSTILE
    hostile = {**samples[0], "text": HOSTILE, "label": HOSTILE, "prediction": HOSTILE}
    hostile["exits"] = [{"prediction": HOSTILE, "score": 0.5}]
    point = {"name": HOSTILE, "kind": HOSTILE, "flops_fraction": 0.5, "accuracy": 0.5}
    page = render_page(report, [hostile], [point], [], dict.fromkeys(("title", "model", "command"), HOSTILE))
    elements = Elements(page)
    assert len(elements.scripts) == 2
    assert "img" not in {tag for tag, _ in elements.tags}
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert not set("<>&\u2028") & set(elements.scripts[0])
    assert payload(page)["samples"][0]["t"] == HOSTILE
    assert "49" not in elements.text.split("Accuracy 90.1%")[0]


def test_lone_surrogates_and_control_characters_can_be_written_as_utf8(samples, report):
    odd = {**samples[0], "text": "a\ud800b\x00c"}
    page = render_page(report, [odd], [{"name": "\ud800\x01", "kind": "x", "flops_fraction": 1, "accuracy": 1}])
    assert payload(page)["samples"][0]["t"] == "a?b\x00c"
    page.encode("utf-8")


def test_an_empty_run_says_what_is_missing():
    elements = Elements(render_page({}, [], []))
    for words in (
        "Accuracy not measured dense accuracy not measured",
        "Inference compute not measured",
        "Inference time not measured",
        "Training compute not measured of dense FLOPs; time not measured",
        "No samples were recorded in this run.",
        "not drawn: accuracy against compute; compute during training; where samples left; head units run in",
    ):
        assert words in elements.text
    assert elements.scripts == []


@pytest.mark.parametrize("field", ["accuracy", "seconds", "mean_heads", "layers_histogram", "head_usage", "budget"])
@pytest.mark.parametrize("how", ["absent", "none"])
def test_every_field_may_be_missing(field, how, report, samples, points):
    report.pop(field) if how == "absent" else report.update({field: None})
    assert Elements(render_page(report, samples, points)).text


def test_not_a_number_is_not_measured(report, samples):
    report["accuracy"], samples[0]["score"] = float("nan"), float("inf")
    page = render_page(report, samples, [])
    assert "Accuracy not measured" in Elements(page).text
    assert payload(page)["samples"][0]["s"] is None


def test_unknown_fields_are_listed_with_all_figures(report, samples):
    report["arm_entropy"], report["nested"], report["new_fraction"] = 1.25, {"a": 1}, 0.5
    text = Elements(render_page(report, samples, [])).text
    assert "arm_entropy 1.25" in text
    assert "new_fraction 50.0%" in text
    assert "nested" not in text


@pytest.mark.parametrize(("count", "layers", "heads"), [(1, 1, 1), (3, 1, 2), (30, 24, 16), (0, 6, 12)])
def test_runs_of_any_size(count, layers, heads, make_run):
    report, samples = make_run(count, layers, heads)
    page = render_page(report, samples, [])
    assert "What each sample ran" in page
    if count:
        data = payload(page)
        assert (data["layers"], data["heads"], len(data["samples"])) == (layers, heads, count)


def test_samples_of_one_class_and_without_labels(samples, report):
    bare = [{"text": "only a text"}, {"text": None, "label": 1, "prediction": 1, "layers": None}]
    rows = payload(render_page(report, [*bare, *({**s, "label": "positive"} for s in samples)], []))["samples"]
    assert rows[0] == {"t": "only a text", "y": None, "p": None, "s": None, "n": 0, "h": [], "f": None, "e": []}
    assert (rows[1]["t"], rows[1]["y"], rows[1]["p"]) == ("", "1", "1")
    assert {row["y"] for row in rows[2:]} == {"positive"}


def test_head_sets_are_bit_masks(report):
    sample = {"text": "x", "layers": 2, "heads": [[0, 3], [11]], "exits": []}
    assert payload(render_page(report, [sample], []))["samples"][0]["h"] == ["9", "800"]


@pytest.mark.parametrize(
    ("layers", "exits", "places"), [(3, 3, [1, 2, 3]), (3, 4, [0, 1, 2, 3]), (3, 1, [3]), (3, 2, [None, 3]), (0, 0, [])]
)
def test_exits_are_placed_only_where_their_layer_is_known(layers, exits, places, report):
    sample = {"layers": layers, "exits": [{"prediction": "p", "score": 0.5}] * exits}
    row = payload(render_page(report, [sample], []))["samples"][0]
    assert [place for place, _, _ in row["e"]] == places


def test_a_very_long_text_is_cut_visibly(report):
    row = payload(render_page(report, [{"text": "x" * 12_000}], []))["samples"][0]
    assert row["t"].endswith("x … (10,000 more characters)")


def test_the_run_itself_is_drawn_when_nothing_was_compared(report, samples):
    page = render_page(report, samples, [])
    assert "this run: accuracy 90.1%" in page
    assert "Accuracy and compute in numbers" not in page


def test_dense_accuracy_comes_from_the_points_when_the_report_has_none(report, points):
    del report["dense_accuracy"]
    report["accuracy"] = 0.9251
    assert "dense 91.5%, 1.0 points higher" in Elements(render_page(report, [], points)).text
    assert "dense accuracy not measured" in Elements(render_page(report, [], points[1:])).text


def test_meta_is_shown_in_words(page):
    text = Elements(page).text
    assert "versions dht 0.1.0, torch 2.13.0, transformers 5.17.0" in text
    assert "minilm (6 layers, 12 heads), film reviews, test split. Over 300 samples" in text
