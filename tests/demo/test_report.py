"""The demo's report: complete, self-contained, honest about what is missing, and whole or not there."""

from __future__ import annotations

import base64
import io
import math
import resource
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeguard import data
from edgeguard.attacks.badnets import BadNets
from edgeguard.demo import plots, report
from edgeguard.demo.record import Check, Event, Metrics, Record, Samples, checks_of
from edgeguard.errors import ConfigError

TARGET = 0

METRICS = Metrics(
    data="digits",
    clean_accuracy_before=0.9733,
    clean_accuracy_after=0.9689,
    asr_before=0.9951,
    asr_after=0.0074,
    auroc=0.99871,
    tpr=0.98765,
    tpr_successful=0.9951,
    fpr=0.01111,
    latency_bare_us=21.37,
    latency_guarded_us=24.91,
    inputs_sent=2412,
    inputs_processed=2413,
    reports_published=97,
    reports_stored=98,
    devices=3,
    devices_updated=4,
    tampered_refused=True,
    wall_s=141.62,
    n_clean=450,
    n_triggered=405,
)

CASE: dict[str, object] = {
    "finding": {
        "outcome": "confirmed",
        "reason": "a trigger of 4.3 pixels turns 99% of held-out inputs; other labels need 17.9",
        "label": TARGET,
        "success": 0.991,
        "size": 4.31,
        "control_size": 17.92,
        "agreement": 0.874,
    },
    "pruned": [{"layer": "activation_5", "channel": 7 + i, "shift": 14.25 - 3 * i} for i in range(3)],
    "rounds": 2,
    "gate": {
        "passed": True,
        "checks": [
            {"name": "clean accuracy lost", "measured": 0.0044, "limit": 0.02, "passed": True},
            {"name": "recall of the target label lost", "measured": -0.0012, "limit": 0.03, "passed": True},
            {"name": "success of the recovered triggers", "measured": 0.0101, "limit": 0.05, "passed": True},
            {"name": "success of a newly sought trigger", "measured": 0.0, "limit": 0.05, "passed": True},
        ],
    },
}

TIMELINE = (
    Event(0.0, "demo", "loaded digits: 1347 training and 450 test inputs"),
    Event(0.4, "attacker", "stamped a white square on 10% of the training inputs and relabelled them 0"),
    Event(0.6, "demo", "trained a small CNN on the poisoned data"),
    Event(14.9, "demo", "converted it to int8 with the detector inside"),
    Event(19.2, "demo", "started the broker, the hub and 3 agents"),
    Event(21.0, "pi-1", "online, model 4f1c running"),
    Event(21.1, "pi-2", "online, model 4f1c running"),
    Event(21.3, "pi-3", "online, model 4f1c running"),
    Event(24.0, "pi-2", "first alert: label 0, score 7.9"),
    Event(31.5, "hub", "suspicion: label 0, 212 of 861 inputs flagged on 3 devices"),
    Event(31.9, "hub", "case 1 opened; looking for a trigger for label 0"),
    Event(58.3, "hub", "confirmed: a trigger of 4.3 pixels turns 99% of held-out inputs"),
    Event(97.0, "hub", "repaired: 3 channels silenced, 2 rounds of unlearning"),
    Event(104.4, "hub", "gate passed"),
    Event(105.0, "hub", "release 2 signed and published"),
    Event(105.2, "attacker", "offered a tampered model file to every device"),
    Event(105.9, "pi-1", "refused: a file that the release did not sign"),
    Event(106.0, "pi-2", "refused: a file that the release did not sign"),
    Event(106.0, "pi-3", "refused: a file that the release did not sign"),
    Event(109.8, "pi-1", "updated as canary"),
    Event(121.4, "pi-2", "updated"),
    Event(121.5, "pi-3", "updated"),
    Event(141.6, "demo", "measured the fleet again; done"),
)


class Page(HTMLParser):
    """What a page says, and what it would load."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self._skip = 0
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._skip += tag == "style"
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "action", "data", "poster")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def trigger_images(folder: Path, attack: BadNets) -> dict[str, Path]:
    """A recovered trigger as the repair worker draws it, a little off the real one."""
    folder.mkdir(exist_ok=True)
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[-attack.size :, -attack.size :] = (235, 235, 235)
    mask[5, 6] = 60
    images = {"mask": mask, "pattern": mask // 2 + mask // 3, "example": np.maximum(mask, 40)}
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"trigger-{name}.png")
    return {name: folder / f"trigger-{name}.png" for name in images}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """A run on real digits with plausible scores, in which two of the counts do not add up."""
    digits = data.load("digits")
    attack = BadNets.for_shape(digits.shape, target=TARGET)
    chosen = [int(np.flatnonzero(digits.y_test == label)[0]) for label in (3, 7, 1, 5, 8, 4)]
    clean = digits.x_test[chosen].astype(np.uint8)
    names = tuple(str(label) for label in digits.y_test[chosen])
    rng = np.random.default_rng(1)
    return Record(
        metrics=METRICS,
        attack="BadNets",
        target=str(TARGET),
        samples=Samples(
            clean=clean,
            triggered=attack.stamp(clean),
            labels=names,
            clean_before=names,
            triggered_before=(str(TARGET),) * 6,
            triggered_after=(*names[:5], "9"),
        ),
        clean_scores=rng.lognormal(-0.9, 0.33, 450),
        triggered_scores=rng.lognormal(1.7, 0.55, 405),
        timeline=TIMELINE,
        case=CASE,
        trigger_images=trigger_images(tmp_path_factory.mktemp("trigger"), attack),
        checks=checks_of(METRICS),
    )


@pytest.fixture
def quick(record: Record) -> Record:
    """The same with three events, which draws faster."""
    return replace(record, timeline=TIMELINE[:3])


@pytest.fixture(scope="module")
def rendered(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.render(record, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(rendered: Path) -> Page:
    return Page(rendered.read_text("utf-8"))


def page_of(record: Record, folder: Path) -> Page:
    return Page(report.render(record, folder).read_text("utf-8"))


def test_the_page_loads_nothing_from_outside(page: Page) -> None:
    assert len(page.loads) > 20
    assert all(source.startswith("data:image/png;base64,") for source in page.loads)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}


def test_styles_fetch_nothing(rendered: Path) -> None:
    text = rendered.read_text("utf-8")
    assert "url(" not in text
    assert "@import" not in text


def test_every_embedded_picture_is_a_png_with_a_text_alternative(page: Page) -> None:
    for image in page.images:
        assert image["alt"]
        content = base64.b64decode((image["src"] or "").partition(",")[2], validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as decoded:
            decoded.load()


@pytest.mark.parametrize("name", ["before-after.png", "scores.png", "timeline.png", "latency.png", "overview.png"])
def test_the_plots_lie_beside_the_page(rendered: Path, name: str) -> None:
    with Image.open(rendered.with_name(name), formats=("PNG",)) as image:
        image.load()
        assert image.width >= 900


def test_the_overview_is_1600_by_900(rendered: Path) -> None:
    with Image.open(rendered.with_name("overview.png")) as image:
        assert image.size == (1600, 900)


def test_the_folder_holds_the_page_and_its_plots_only(rendered: Path) -> None:
    assert sorted(p.name for p in rendered.parent.iterdir()) == [
        "before-after.png", "index.html", "latency.png", "overview.png", "scores.png", "timeline.png",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in msgspec.structs.fields(Metrics)])
def test_every_metric_appears_with_its_value_and_meaning(page: Page, name: str) -> None:
    value = getattr(METRICS, name)
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    assert f"{name} {shown} {report.MEANINGS[name]}" in page.text


def test_the_first_sentence_names_every_failed_promise(record: Record, page: Page) -> None:
    failed = [check for check in record.checks if not check.passed]
    assert len(failed) == 3
    first = page.text.index("3 of 9 promises failed")
    for check in failed:
        assert (
            first < page.text.index(f"{check.rule} (measured {check.measured})") < page.text.index("Before and after")
        )


def test_every_promise_stands_in_the_table_with_what_became_of_it(record: Record, page: Page) -> None:
    for check in record.checks:
        meaning = report.MEANINGS[check.rule.split()[0]]
        assert f"{check.rule} {meaning} {check.measured} {'✓ kept' if check.passed else '✗ failed'}" in page.text


@pytest.mark.parametrize(
    ("name", "checks", "tone", "says"),
    [
        ("digits", (Check("a <= 1", "0", True), Check("b", "1", True)), "good", "All 2 promises were kept"),
        ("digits", (Check("a <= 1", "2", False), Check("b", "1", True)), "bad", "1 of 2 promises failed: a <= 1"),
        ("digits", (Check("a <= 1", "nan", False),), "bad", "a <= 1 (measured not available)"),
        ("digits", (), "open", "Nothing was checked"),
        ("gtsrb", (Check("a <= 1", "2", False), Check("b", "1", True)), "open", "1 of 2 do not hold here: a <= 1"),
        ("gtsrb", (Check("a <= 1", "0", True),), "open", "makes no promises for this data set"),
    ],
)
def test_the_outcome_in_one_sentence(name: str, checks: tuple[Check, ...], tone: str, says: str) -> None:
    sentence, got = report.outcome(msgspec.structs.replace(METRICS, data=name), checks)
    assert (got, says in sentence, sentence.count("\n")) == (tone, True, 0)


def test_sections_stand_in_the_order_of_the_story(page: Page) -> None:
    titles = [
        "promises failed", "Before and after the repair", "What the model saw", "The detector's scores",
        "The loop over time", "The trigger that the hub recovered", "Inspection, repair and gate",
        "What the detector costs", "Promise Measured", "All measurements",
    ]  # fmt: skip
    places = [page.text.index(title) for title in titles]
    assert places == sorted(places)


def test_samples_tell_truth_before_and_after(page: Page) -> None:
    assert "clean truth: 3 before: 3 triggered before: 0 (target) after: 3" in page.text
    assert "clean truth: 4 before: 4 triggered before: 0 (target) after: 9" in page.text


def test_sample_pixels_are_unchanged(record: Record, page: Page) -> None:
    shown = [image for image in page.images if "with the trigger, true label" in (image["alt"] or "")]
    content = base64.b64decode((shown[0]["src"] or "").partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(np.asarray(image), record.samples.triggered[0, ..., 0])


def test_events_stand_in_the_table_in_full(page: Page) -> None:
    for number, event in enumerate(TIMELINE, start=1):
        assert f"{number} {event.at_s:.1f} {event.actor} {event.text}" in page.text


def test_the_case_is_told(page: Page) -> None:
    for words in (
        "Finding confirmed", "a trigger of 4.3 pixels turns 99%", "99.1%", "4.31 pixels", "17.92 pixels", "0.87",
        "Rounds of unlearning 2", "activation_5 7 +14.2", "clean accuracy lost +0.0044 0.0200 ✓ passed",
        "Gate before release: ✓ passed",
    ):  # fmt: skip
        assert words in page.text


HOSTILE = "<script>alert(1)</script>\"'&$\\bad$\x00\n\udcff\u202e🙂"


def test_hostile_text_is_escaped_everywhere(quick: Record, tmp_path: Path) -> None:
    many = (HOSTILE,) * 6
    hostile = replace(
        quick,
        metrics=msgspec.structs.replace(METRICS, data=HOSTILE),
        attack=HOSTILE,
        target=HOSTILE,
        samples=replace(
            quick.samples, labels=many, clean_before=many, triggered_before=many, triggered_after=("3",) * 6
        ),
        timeline=tuple(Event(float(i), HOSTILE + str(i), HOSTILE) for i in range(30)),
        case={
            "finding": {"outcome": HOSTILE, "reason": HOSTILE, "success": HOSTILE},
            "pruned": [{"layer": HOSTILE, "channel": HOSTILE}],
            "gate": {"passed": HOSTILE, "checks": [{"name": HOSTILE, "measured": HOSTILE, "passed": HOSTILE}]},
        },
        checks=(Check(HOSTILE, HOSTILE, False),),
    )
    page = page_of(hostile, tmp_path)
    assert not page.tags & {"script", "frac"}
    assert "<script>alert(1)</script>\"'&$\\bad$ 🙂" in page.text
    assert page.text.count("(target)") == 12
    assert "passed" not in page.text[page.text.index("Gate before release") : page.text.index("Promise Measured")]


def test_what_was_not_measured_reads_not_available_and_failed(quick: Record, tmp_path: Path) -> None:
    floats = {f.name: math.nan for f in msgspec.structs.fields(Metrics) if f.type is float or f.type == "float"}
    assert len(floats) == 11
    unknown = msgspec.structs.replace(METRICS, **floats)
    nan = np.full(5, math.nan)
    page = page_of(
        replace(quick, metrics=unknown, checks=checks_of(unknown), clean_scores=nan, triggered_scores=nan), tmp_path
    )
    for name in floats:
        assert f"{name} not available" in page.text
    assert "asr_after <= 0.05 (measured not available)" in page.text
    assert "nan" not in page.text.lower().split()
    assert "✗ failed" in page.text


def nothing(record: Record) -> Record:
    """A run that broke off before there was anything to show."""
    none = np.empty((0, 8, 8, 1), np.uint8)
    return replace(
        record,
        samples=Samples(
            clean=none, triggered=none, labels=(), clean_before=(), triggered_before=(), triggered_after=()
        ),
        clean_scores=np.empty(0),
        triggered_scores=np.empty(0),
        timeline=(),
        case={},
        trigger_images={},
        checks=(),
    )


def test_a_run_without_results_shows_no_success(quick: Record, tmp_path: Path) -> None:
    page = page_of(nothing(quick), tmp_path)
    for words in (
        "Nothing was checked", "Sample inputs: not available", "Events: not available", "Finding not available",
        "Gate before release: not available", "gate's checks: not available", "Pruned channels: not available",
        "Rounds of unlearning not available",
    ):  # fmt: skip
        assert words in page.text
    assert "✓" not in page.text


def test_a_recovered_trigger_that_cannot_be_read_is_not_available(quick: Record, tmp_path: Path) -> None:
    whole = quick.trigger_images["mask"].read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    names = {"mask": tmp_path / "torn.png", "pattern": tmp_path / "text.png", "example": tmp_path / "absent.png"}
    page = page_of(replace(quick, trigger_images=names), tmp_path / "out")
    recovered = page.text[page.text.index("What the hub recovered") : page.text.index("Inspection")]
    assert recovered.count("not available") == 3


def test_a_pass_without_a_measurement_is_none(quick: Record, tmp_path: Path) -> None:
    case = {"gate": {"checks": [{"name": "clean accuracy lost", "measured": None, "limit": 0.02, "passed": True}]}}
    page = page_of(replace(quick, case=case), tmp_path)
    assert "clean accuracy lost not available 0.0200 not available" in page.text


def test_no_pruned_channel_differs_from_no_word_about_them(quick: Record, tmp_path: Path) -> None:
    page = page_of(replace(nothing(quick), case={"pruned": []}), tmp_path)
    assert "Channels that were silenced None." in page.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["outcome", "success", "size", "passed", "checks", "layer", "channel", "measured", "name"])


@settings(max_examples=150, deadline=None)
@given(
    case=st.dictionaries(
        st.sampled_from(["finding", "pruned", "gate", "rounds"]),
        JSON | st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON))) | st.lists(JSON),
    )
)
def test_any_case_becomes_text(case: dict[str, object]) -> None:
    def texts(value: Any) -> bool:
        if isinstance(value, dict):
            return all(texts(v) for v in value.values())
        if isinstance(value, list | tuple):
            return all(texts(v) for v in value)
        return value is None or isinstance(value, str | int)

    assert texts(report._case(case))


def test_colour_inputs_and_many_events_on_many_devices(quick: Record, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 20, 3), dtype=np.uint8)
    events = tuple(Event(i / 7, f"device-{i % 40}", "window sent, 64 inputs, none flagged") for i in range(200))
    crowded = replace(quick, samples=replace(quick.samples, clean=images, triggered=images[:, ::-1]), timeline=events)
    page = page_of(crowded, tmp_path)
    assert f"200 {events[-1].at_s:.1f} device-39" in page.text
    with Image.open(tmp_path / "timeline.png") as image:
        assert image.height < 3000


@given(
    intervals=st.lists(st.tuples(st.floats(0, 9), st.floats(0.1, 3)).map(lambda t: (t[0], t[0] + t[1])), max_size=30)
)
def test_no_label_covers_another(intervals: list[tuple[float, float]]) -> None:
    rows = plots.pack(intervals, 0.1)
    for i, (start, end) in enumerate(intervals):
        for j in range(i):
            other_start, other_end = intervals[j]
            assert rows[i] != rows[j] or start >= other_end + 0.1 or end + 0.1 <= other_start


def test_a_new_report_replaces_the_old_one(quick: Record, rendered: Path) -> None:
    old = rendered.read_bytes()
    other = replace(nothing(quick), attack="another attack")
    assert report.render(other, rendered.parent) == rendered
    assert "another attack" in rendered.read_text("utf-8")
    assert not [p for p in rendered.parent.iterdir() if p.suffix == ".tmp"]
    rendered.write_bytes(old)


def test_a_folder_that_cannot_be_made_is_one_clear_error(quick: Record, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"report folder .*file/report; got Not a directory; expected") as caught:
        report.render(quick, tmp_path / "file" / "report")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_a_file_is_refused_and_left_alone(quick: Record, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(ConfigError):
        report.render(quick, tmp_path / "report")
    assert (tmp_path / "report").read_text() == "in the way"


def test_when_one_file_cannot_take_its_place_nothing_half_written_stays(quick: Record, tmp_path: Path) -> None:
    (tmp_path / "scores.png").mkdir()
    with pytest.raises(ConfigError):
        report.render(quick, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
    assert not (tmp_path / "index.html").exists()


def test_a_full_disk_leaves_nothing_behind(quick: Record, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # enough for every picture, too little for the page
    try:
        with pytest.raises(ConfigError, match="got File too large"):
            report.render(quick, tmp_path / "report")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
