"""The comparison against values worked out by hand, and its pages as a reader and a voter meet them in a browser."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from browser import open_page
from PIL import Image
from safetensors.torch import load_file

import compare_models
import evaluate_hps
from toy import make_data
from utils import recipe, votes
from utils.errors import UserError

HOSTILE = (
    '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"> & "quoted" $x_1$'
)


def run(*words) -> None:
    compare_models.main(compare_models.parse_args([str(word) for word in words]))


def make_folder(folder: Path, rows: list[tuple[str, str]], shade: int = 0, scores=None) -> Path:
    """Make a folder as generate_images.py leaves it, of small pictures that all differ, and scores beside it."""
    folder.mkdir(parents=True)
    for i, (name, _) in enumerate(rows):
        Image.new("RGB", (16, 16), (shade, i % 256, i // 256)).save(folder / name, quality=95)
    meta = [{"file_name": name, "caption": caption, "seed": i} for i, (name, caption) in enumerate(rows)]
    (folder / "meta.json").write_text(json.dumps(meta))
    if scores is not None:
        lines = [{"file_name": n, "caption": c, "score": float(s)} for (n, c), s in zip(rows, scores, strict=True)]
        folder.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def numbered(captions) -> list[tuple[str, str]]:
    return [(f"{i}.png", caption) for i, caption in enumerate(captions)]


def words_of(world: Path, *names) -> list:
    """Return the options that compare folders by the scores beside them."""
    base, *others = names
    candidates = [word for name in others for word in ("--candidate", world / name)]
    return ["--baseline", world / base, *candidates, "--scores", *(world / f"{name}.jsonl" for name in names)]


def page_data(report: Path) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', (report / "index.html").read_text())
    return json.loads(found[1])


# --- statistics ---


def test_statistics_equal_those_worked_out_by_hand():
    found = compare_models.statistics(np.array([1.0, 2, 3, 1, 1, 4, 2, 1, -2, 0]))
    assert (found["wins"], found["ties"], found["losses"]) == (8, 1, 1)
    assert found["difference"] == pytest.approx(1.3)
    assert found["win_rate"] == pytest.approx(0.85)
    assert found["p"] == pytest.approx(2 * (1 + 9) / 2**9)  # 8 or more of 9 heads, or tails
    # Squares of 1 2 3 1 1 4 2 1 -2 0 sum to 41; less 10 times 1.3 squared; over 9.
    assert found["spread"] == pytest.approx(((41 - 10 * 1.69) / 9) ** 0.5)

    wider = compare_models.statistics(np.array([1.0, 2, 3, 1, 1, 4, 2, 1, -2, 0]), tie=1.0)
    assert (wider["wins"], wider["ties"], wider["losses"]) == (4, 5, 1)
    alone = compare_models.statistics(np.array([0.0]))
    assert (alone["interval"], alone["spread"], alone["p"], alone["win_rate"]) == (None, None, 1.0, 0.5)


def test_the_interval_is_the_percentile_bootstraps():
    differences = np.random.default_rng(1).exponential(2, 200) - 1
    rng = np.random.default_rng(2)
    means = [differences[rng.integers(0, 200, 200)].mean() for _ in range(20_000)]
    assert compare_models.statistics(differences)["interval"] == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=0.02
    )


def test_several_pictures_of_a_prompt_count_as_one():
    args = compare_models.parse_args(["--baseline", "a", "--candidate", "b", "--candidate", "c"])
    # The first prompt has three pictures; averaged, the second model wins it, the third ties.
    values = np.array([[0, 5, 1], [0, -1, 0], [0, 0, -1], [2, 1, 3]], float)
    found = compare_models.compare("HPS", values, compare_models.group(["a", "a", "a", "b"]), args)
    assert [row["mean"] for row in found["rows"]] == pytest.approx([1, (4 / 3 + 1) / 2, 1.5])
    assert [(r["wins"], r["ties"], r["losses"]) for r in found["rows"][1:]] == [(1, 0, 1), (1, 1, 0)]
    assert found["matrix"] == [[0.5, 0.5, 0.25], [0.5, 0.5, 0.5], [0.75, 0.5, 0.5]]


def test_votes_equal_those_worked_out_by_hand():
    items = [votes.Item(str(i), caption, "new", (Path("a"), Path("b"))) for i, caption in enumerate("pqrr")]
    rows = []

    def cast(voter, item, winner):
        rows.append({"voter": voter, "id": item, "winner": winner})

    cast("ann", "0", "baseline"), cast("ann", "0", "candidate")  # the last one counts
    cast("ann", "1", "tie"), cast("ann", "2", "baseline"), cast("ann", "3", "candidate")
    cast("bob", "0", "candidate"), cast("bob", "1", "baseline"), cast("bob", "gone", "candidate")
    found = votes.tally(rows, items, "old")
    # Prompt p: 1 and 1. q: 1/2 and 0. r: the mean of its two pairs, 0 and 1.
    (row,) = found["rows"]
    assert row["win_rate"] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert (row["wins"], row["ties"], row["losses"], row["prompts"]) == (3, 1, 2, 3)
    assert row["agreement"] == 0.5
    # Of the four answers of shared pairs (1 1, 1/2 0), half disagree; 2 of 4 are alike by chance in 2 x 1 of 4 x 3 draws.
    assert row["alpha"] == pytest.approx(1 - 0.5 / (10 / 12))
    assert found["voters"] == [{"name": "ann", "votes": 4}, {"name": "bob", "votes": 2}] and found["foreign"] == 1
    draws = np.quantile(np.random.default_rng(0).beta(1.75 + 0.5, 1.25 + 0.5, 400_000), [0.025, 0.975])
    assert row["interval"] == pytest.approx(draws, abs=0.005)
    assert votes.proportion_interval(5, 5)[1] == 1.0 and votes.proportion_interval(0, 5)[0] == 0.0


def test_alpha_equals_krippendorffs_own_example():
    """ "Computing Krippendorff's Alpha-Reliability" (2011), A: binary data, two observers, no missing data."""
    meg, owen = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    agreement, alpha = votes.agree([[float(a), float(b)] for a, b in zip(meg, owen, strict=True)])
    assert agreement == pytest.approx(0.6) and alpha == pytest.approx(0.095, abs=0.0005)
    assert votes.agree([[1.0], [0.0]]) == (None, None)
    assert votes.agree([[1.0, 1.0]]) == (1.0, None)


# --- folders and scores ---


@pytest.fixture
def hpc(tmp_path) -> Path:
    clip = make_data.MODEL.parent / "clip.safetensors"
    weights = {key: value.float() for key, value in load_file(clip).items()}
    torch.save(
        {"state_dict": weights, "model": json.loads(clip.with_suffix(".json").read_text())}, tmp_path / "hpc.pth"
    )
    return tmp_path / "hpc.pth"


def test_from_folders_to_a_report(tmp_path, hpc, capsys):
    captions = ["a red circle", "a blue square", "a red circle", "only here", "a broken one", HOSTILE]
    base = make_folder(tmp_path / "run/base", numbered(captions))
    # Another order, another format, one prompt missing, another file name, and one that is no picture.
    rows = [("5.jpg", HOSTILE), ("1.jpg", "a blue square"), ("x.jpg", "a red circle"), ("2.jpg", "a red circle")]
    new = make_folder(tmp_path / "run/new", [*rows, ("4.jpg", "a broken one"), ("9.jpg", "only there")], shade=200)
    (new / "4.jpg").write_text("<html>")
    report = tmp_path / "report"
    words = ["--hpc", hpc, "--baseline", base, "--candidate", new, "--output", report, "--num_workers", 0]
    run(*words)
    said = capsys.readouterr()
    for name, reason in (("base/3.png", "no partner"), ("new/9.jpg", "no partner"), ("new/4.jpg", "no HPS of it")):
        assert re.search(rf"left out: \S*{name}: {reason}", said.err)
    assert "left out: 3 pictures" in said.err and "3 prompts, 4 pairs, 3 pictures left out" in said.out
    left_out = [json.loads(line) for line in (report / "report.errors.jsonl").read_text().splitlines()]
    assert [Path(row["item"]).name for row in left_out] == ["3.png", "9.jpg", "4.jpg"]

    # Pairs keep the baseline's order; what they hold is what evaluate_hps.py says of the very same pictures.
    data = page_data(report)
    assert [pair["caption"] for pair in data["pairs"]] == [captions[i] for i in (0, 1, 2, 5)]
    partners = [("0.png", "x.jpg"), ("1.png", "1.jpg"), ("2.png", "2.jpg"), ("5.png", "5.jpg")]
    for m, folder in enumerate((base, new)):
        evaluate_hps.main(
            evaluate_hps.parse_args(
                f"--hpc {hpc} --image_folder {folder} --meta_file {folder}/meta.json --output {tmp_path}/{m}.jsonl "
                "--num_workers 0 --skip_errors".split()
            )
        )
        rows = [json.loads(line) for line in (tmp_path / f"{m}.jsonl").read_text().splitlines()]
        scores = {row["file_name"]: row["score"] for row in rows}
        for pair, names in zip(data["pairs"], partners, strict=True):
            assert (report / pair["pictures"][m]).read_bytes() == (folder / names[m]).read_bytes()
            assert pair["values"][0][m] == pytest.approx(scores[names[m]], abs=1e-5)
    values = np.array([pair["values"][0] for pair in data["pairs"]])
    differences = [values[[0, 2]].mean(0) @ [-1, 1], values[1] @ [-1, 1], values[3] @ [-1, 1]]
    summary = json.loads((report / "summary.json").read_text())
    assert summary["scores"][0]["rows"][1]["difference"] == pytest.approx(np.mean(differences), abs=1e-5)
    assert summary["scores"][0]["rows"][1]["wins"] == sum(d > 0 for d in differences)
    with Image.open(report / "figure.png") as figure:
        assert figure.width > 400 and figure.size == Image.open(report / "figure.png").size

    # A rerun scores nothing again; new pictures under old names are refused, and so are other folders.
    kept = {path: path.read_text() for path in (report / "scores").glob("*.jsonl")}
    run(*words, "--figure_prompts", "blue", "a red circle")
    assert {path: path.read_text() for path in kept} == kept
    assert Image.open(report / "figure.png").width < figure.width
    with pytest.raises(UserError, match="'a' is part of 2 prompts"):
        run(*words, "--figure_prompts", "a")
    with pytest.raises(UserError, match=r"report\.run\.json: .*candidates was"):
        run(*words, "--candidate", make_folder(tmp_path / "run/third", numbered(captions)))
    later = (new / "1.jpg").stat().st_mtime + 60
    os.utime(new / "1.jpg", (later, later))
    with pytest.raises(UserError, match=r"1\.jpg and 0 more changed"):
        run(*words)
    run(*words, "--overwrite")


def test_other_scores_and_several_models(tmp_path, capsys):
    captions = ["p", "q", "r"]
    for name, scores in (("a", (1, 2, 3)), ("b", (2, 2, 2)), ("c", (4, 5, 6))):
        make_folder(tmp_path / name, numbered(captions), scores=scores)
    shutil.copytree(tmp_path / "a", tmp_path / "other/a")
    words = [*words_of(tmp_path, "a", "b", "c"), "--output", tmp_path / "report"]
    run(*words, "--score_names", "aesthetic", "--labels", "SD 1.4", "ours", "theirs")
    out = capsys.readouterr().out
    assert re.search(r"aesthetic +mean", out) and re.search(r"theirs +5\.000 +\+3\.000", out)
    assert re.search(r"aesthetic: how often.*\n +SD 1\.4 +ours +theirs\nSD 1\.4 +50\.0% +0\.0%\n", out)
    data = page_data(tmp_path / "report")
    assert data["labels"] == ["SD 1.4", "ours", "theirs"] and data["pairs"][2]["values"] == [[3, 2, 6]]

    # Folders of one name are told apart by what is above them.
    folders = ["--baseline", tmp_path / "a", "--candidate", tmp_path / "other/a", "--output", tmp_path / "second"]
    run(*folders, "--scores", tmp_path / "a.jsonl", "--scores", tmp_path / "a.jsonl")
    assert page_data(tmp_path / "second")["labels"] == [f"{tmp_path.name}/a", "other/a"]
    assert page_data(tmp_path / "second")["scores"][0]["rows"][1]["ties"] == 3


def test_mistakes(tmp_path):
    for name in "ab":
        make_folder(tmp_path / name, numbered("pq"), scores=(1, 2))
    words = [*words_of(tmp_path, "a", "b"), "--output", tmp_path / "report"]
    (tmp_path / "nan.jsonl").write_text('{"file_name": "0.png", "caption": "p", "score": NaN}\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    empty = make_folder(tmp_path / "other", numbered("xy"))
    for extra, said in (
        (["--candidate", tmp_path / "a"], "compared with itself"),
        (["--candidate", tmp_path / "none"], r"none/meta\.json: no such file"),
        (["--labels", "x", "x"], "expected 2 different names"),
        (["--scores", tmp_path / "a.jsonl"], "a file for each of the 2 folders, found 3"),
        (["--scores", tmp_path / "a.jsonl", tmp_path / "nan.jsonl"], r"nan\.jsonl: row 1: .*finite, found nan"),
        (["--score_names", "x", "y"], "2 names for 1 scores"),
        (["--tie", "-1"], "should be 0 or more"),
        (["--output", tmp_path / "mine", "--overwrite"], "mine: holds other things than a report"),
        (["--figure_prompts", "z"], "'z' is part of 0 prompts"),
    ):
        with pytest.raises(UserError, match=said):
            run(*words, *extra)
    bare = ["--baseline", tmp_path / "a", "--output", tmp_path / "bare", "--candidate"]
    with pytest.raises(UserError, match="give --hpc, --scores or --vote"):
        run(*bare, tmp_path / "b")
    with pytest.raises(UserError, match="no picture has a partner"):
        run(*bare, empty, "--output", tmp_path / "nothing", "--vote")
    assert (tmp_path / "mine/thesis.txt").exists()


# --- the report in a browser ---


def test_the_report_sorts_filters_and_zooms_with_2000_pairs(tmp_path):
    captions = [f"prompt {i} of many, {'rare ' if i % 100 == 7 else ''}word" for i in range(1999)]
    captions.insert(1000, HOSTILE)
    rng = np.random.default_rng(0)
    difference = np.round(rng.normal(0.5, 2, 2000), 3)
    base = rng.normal(20, 1, 2000).round(3)
    make_folder(tmp_path / "base", numbered(captions), scores=base)
    make_folder(tmp_path / "new", numbered(captions), shade=255, scores=base + difference)
    run(*words_of(tmp_path, "base", "new"), "--output", tmp_path / "report")
    moved = (tmp_path / "report").rename(tmp_path / "sent to a friend")
    shutil.rmtree(tmp_path / "base"), shutil.rmtree(tmp_path / "new")
    order = np.argsort(-difference, kind="stable")

    with open_page() as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{moved}/index.html")
        shown = page.locator("#grid article")
        page.wait_for_function("document.querySelector('#grid img').naturalWidth === 16")
        assert page.title() == "base · new"
        assert f"{(difference > 0).mean():.1%}".replace("%", " %") in page.inner_text(".facts")
        first = shown.nth(0)
        assert first.locator(".caption").text_content() == captions[order[0]]
        assert first.locator("img").nth(1).get_attribute("src") == f"pictures/1/{order[0]}.png"
        assert first.locator("b").inner_text() == f"+{difference[order[0]]:.2f}"
        # Of 2,000 pairs only those near the screen are there and are loaded.
        assert shown.count() < 300 and len(asked) < 300

        # Down to the end, and the other way round.
        for _ in range(60):
            page.keyboard.press("End")
            if shown.count() == 2000:
                break
            page.wait_for_timeout(30)
        assert shown.count() == 2000
        page.select_option("#sort", "worst")
        assert page.evaluate("scrollY <= document.querySelector('#begin').offsetTop")
        assert first.locator(".caption").text_content() == captions[order[-1]]
        page.select_option("#sort", "order")
        assert first.locator(".caption").text_content() == captions[0]

        # The filter; the bars of the histogram, which together hold every pair once.
        page.fill("#text", "RARE")
        assert page.inner_text("#count") == "20 of 2000 pairs" and shown.count() == 20
        page.fill("#text", "nothing like it")
        assert page.is_visible("#none")
        page.fill("#text", "")
        heights = [int(bar.get_attribute("title").split(": ")[1]) for bar in page.locator(".bars button").all()]
        assert sum(heights) == 2000
        under = sum(
            h
            for h, bar in zip(heights, page.locator(".bars button").all(), strict=True)
            if "under" in (bar.get_attribute("class") or "")
        )
        assert under == (difference < 0).sum()
        page.locator(".bars button").nth(heights.index(max(heights))).click()
        assert page.inner_text("#count") == f"{max(heights)} of 2000 pairs"
        page.locator(".bars button").nth(heights.index(max(heights))).click()

        # The keyboard: into the pairs, zoom, on, out.
        page.select_option("#sort", "best")
        page.locator("h1").click()
        page.keyboard.press("ArrowRight"), page.keyboard.press("ArrowRight"), page.keyboard.press("Enter")
        assert page.is_visible("#zoom") and page.inner_text("#zoomed") == captions[order[1]]
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#zoomed") == captions[order[2]]
        page.keyboard.press("ArrowLeft"), page.keyboard.press("Escape")
        assert not page.is_visible("#zoom")
        shown.nth(4).locator("button").click()
        assert page.inner_text("#zoomed") == captions[order[4]]
        page.keyboard.press("Escape")

        # A prompt is text, whatever it holds.
        page.fill("#text", "onerror")
        assert first.locator(".caption").text_content() == HOSTILE and page.title() == "base · new"
        assert all(url.startswith("file://") for url in asked) and page.problems == []

    with open_page(390, 844, dark=True) as page:
        page.goto(f"file://{moved}/index.html")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 20)"


# --- the vote ---


def test_a_blind_vote_in_the_browser(tmp_path):
    captions = [HOSTILE, *(f"prompt {i}" for i in range(5))]
    for name, shade in (("secret_base", 0), ("secret_new", 255)):
        make_folder(tmp_path / name, numbered(captions), shade)
    pairs = [(tmp_path / f"secret_base/{i}.png", tmp_path / f"secret_new/{i}.png") for i in range(6)]
    items = [votes.Item(votes.item_id(*pair), c, "secret_new", pair) for c, pair in zip(captions, pairs, strict=True)]
    path = tmp_path / "votes.jsonl"
    page_text = compare_models.fill_page({"total": len(items)})
    server = votes.serve(page_text, items, "secret_base", path, seed=3, port=0)
    assert server.server_address[0] == "127.0.0.1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    try:
        with open_page() as page:
            told = []
            page.on("request", lambda request: told.append(request.url))

            def begin(name):
                page.goto(url)
                page.fill("#voter", name)
                page.keyboard.press("Enter")
                page.wait_for_selector("#ballot:visible")

            def reddish(side):
                """Whether the picture on this side is the candidate's, from its very pixels."""
                page.wait_for_function(f"document.querySelector('.large [data-choice={side}] img').naturalWidth")
                return page.evaluate(
                    "side => { const c = document.createElement('canvas').getContext('2d');"
                    "c.drawImage(document.querySelector(`.large [data-choice=${side}] img`), 0, 0);"
                    "return c.getImageData(3, 3, 1, 1).data[0] > 128 }",
                    side,
                )

            def vote(act, place):
                truth = (page.inner_text("#prompt"), reddish("left"))
                assert reddish("right") is not truth[1]
                act()
                page.wait_for_function(f"document.querySelector('#progress').textContent === '{place} of 6'")
                return truth

            begin("ann")
            seen = [vote(lambda: page.keyboard.press("1"), 2), vote(lambda: page.keyboard.press("2"), 3)]
            page.keyboard.press("ArrowLeft")
            page.wait_for_function("document.querySelector('#progress').textContent === '2 of 6'")
            assert page.locator(".large .chosen").get_attribute("data-choice") == "right"
            seen.append(vote(lambda: page.keyboard.press("0"), 3))
            # Gone, and back under the same name: on goes what is left.
            begin("ann")
            assert page.inner_text("#progress") == "3 of 6"
            seen.append(vote(lambda: page.click(".row [data-choice=left]"), 4))
            seen.append(vote(lambda: page.click(".large [data-choice=right]"), 5))
            seen.append(vote(lambda: page.keyboard.press("1"), 6))
            sent = [requests.get(url).text, requests.get(f"{url}items?voter=ann").text, page.content(), *told]
            assert "secret" not in " ".join(sent)
            page.keyboard.press("1")
            page.wait_for_selector("#result table")
            assert "secret_new" in page.inner_text("#result") and page.problems == [] and page.title() != "owned"

        rows = votes.read(path)
        assert [row["choice"] for row in rows] == ["left", "right", "tie", "left", "right", "left", "left"]
        for row, (caption, left_is_new) in zip(rows, seen, strict=False):
            assert row["caption"] == caption and row["voter"] == "ann" and row["seed"] == 3
            assert row["left"] == ("secret_new" if left_is_new else "secret_base") != row["right"]
            won = {"left": left_is_new, "right": not left_is_new}.get(row["choice"])
            assert row["winner"] == {True: "candidate", False: "baseline", None: "tie"}[won]

        # What is no vote is refused, and so is what another site makes the browser send.
        good = {"id": items[0].id, "choice": "left"}
        for body, where, headers in (
            ({**good, "choice": "up"}, "vote?voter=x", {}),
            ({**good, "id": "nothing"}, "vote?voter=x", {}),
            ([], "vote?voter=x", {}),
            (good, "vote", {}),
            (good, f"vote?voter={'x' * 41}", {}),
            (good, "vote?voter=x", {"Host": "evil.example"}),
            (good, "vote?voter=x", {"Content-Type": "text/plain"}),
        ):
            answer = requests.post(
                url + where, data=json.dumps(body), headers={"Content-Type": "application/json", **headers}
            )
            assert answer.status_code == 400
        for where in (
            "picture/../votes.jsonl/left?voter=x",
            f"picture/{items[0].id}/up?voter=x",
            "votes.jsonl",
            "items",
        ):
            assert requests.get(url + where).status_code == 404
        assert requests.get(url + "items?voter=x", headers={"Host": "evil.example"}).status_code == 404
        assert len(votes.read(path)) == 7
    finally:
        server.shutdown(), server.server_close()


def test_sides_and_order_are_shuffled_for_each_voter():
    items = [votes.Item(str(i), "", "new", (Path("a"), Path("b"))) for i in range(1000)]
    left = {voter: [votes.sides(i, voter, 0)["left"] for i in items] for voter in ("ann", "bob")}
    for sides in left.values():
        assert 430 < sum(sides) < 570
    assert 430 < sum(a == b for a, b in zip(*left.values(), strict=True)) < 570
    assert left["ann"] == [votes.sides(i, "ann", 0)["left"] for i in items]
    assert left["ann"] != [votes.sides(i, "ann", 1)["left"] for i in items]


def test_the_vote_from_the_command_line(tmp_path):
    for name, shade in (("base", 0), ("new", 9)):
        make_folder(tmp_path / name, numbered("pqr"), shade)
    options = "--baseline base --candidate new --output report --vote --port 0 --labels base new"
    command = [sys.executable, Path(__file__).parent.parent / "compare_models.py", *options.split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = next(match[1] for line in process.stdout if (match := re.match(r"vote on (\S+)", line)))
    for voter in ("ann", "bob"):
        for item in requests.get(f"{url}/items?voter={voter}").json():
            left = requests.get(f"{url}/picture/{item['id']}/left?voter={voter}").content
            is_new = left == (tmp_path / f"new/{'pqr'.index(item['caption'])}.png").read_bytes()
            row = {"id": item["id"], "choice": "left" if is_new else "right"}
            assert requests.post(f"{url}/vote?voter={voter}", json=row).ok
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == ""
    assert "blind votes of ann (3), bob (3)\nnew wins 100.0% [" in out and "voters agree in 100.0%" in out
    assert page_data(tmp_path / "report")["votes"]["rows"][0]["wins"] == 6
    # Changed pictures are another pair: the votes on the old ones do not count for them.
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "new/0.png")
    run("--baseline", tmp_path / "base", "--candidate", tmp_path / "new", "--output", tmp_path / "report")
    found = page_data(tmp_path / "report")["votes"]
    assert found["rows"][0]["prompts"] == 2 and found["foreign"] == 2


def test_voters_are_not_sent_the_recipe(tmp_path):
    path = tmp_path / "0.jpg"
    Image.new("RGB", (8, 8), "red").save(path, **recipe.save_options("a cat\nLora hashes: adapted: 1234", "JPEG"))
    assert "adapted" in path.read_bytes().replace(b"\0", b"").decode("latin-1")
    with Image.open(io.BytesIO(votes.pixels(path))) as sent:
        assert not sent.getexif() and not sent.info
        assert np.array_equal(np.asarray(sent), np.asarray(Image.open(path)))
