"""A blind A/B vote on 127.0.0.1: which picture stands on which side, the server, and what the votes say.

A vote is a row of votes.jsonl: voter, id (of the pair, by the content of its two pictures), caption, left and right (the
models that stood there), choice ("left", "right" or "tie"), winner ("baseline", "candidate" or "tie"), seed, time. A voter's
last vote on a pair counts.
Nothing that the browser is sent tells which model made a picture, before the voter has voted on every pair.
"""

import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import numpy as np
from scipy import stats

from utils import jsonl
from utils.images import open_image, to_rgb

CHOICES = ("left", "right", "tie")
MAX_NAME = 40  # characters of a voter's name


class Item(NamedTuple):
    """A baseline's and a candidate's picture of one prompt; `item_id` makes the id."""

    id: str
    caption: str
    candidate: str
    pictures: tuple[Path, Path]


def item_id(*pictures: Path) -> str:
    """Return a pair's name: changed pictures are another pair, and their old votes do not count for it."""
    digests = [hashlib.sha256(path.read_bytes()).digest() for path in pictures]
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def draw(*what) -> bytes:
    """Return what is random about something as bytes that depend on nothing else."""
    return hashlib.sha256("\0".join(map(str, what)).encode()).digest()


def sides(item: Item, voter: str, seed: int) -> dict[str, int]:
    """Return which of the item's pictures stands on the left and on the right, shuffled for each voter and pair."""
    left = draw(seed, voter, item.id, "side")[0] & 1
    return {"left": left, "right": 1 - left}


# --- the server ---


def pixels(picture: Path) -> bytes:
    """Return a picture as a PNG without its recipe, which would tell the model."""
    encoded = io.BytesIO()
    to_rgb(open_image(picture)).save(encoded, "PNG")
    return encoded.getvalue()


def serve(page: str, items: list[Item], baseline: str, path: Path, seed: int, port: int) -> ThreadingHTTPServer:
    """Return a server of the vote; the caller runs `serve_forever`. OSError if the port is taken."""
    by_id, lock, votes = {item.id: item for item in items}, threading.Lock(), jsonl.Appender(path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            what, voter = self.asked()
            if what == [""]:
                self.answer(page.encode(), "text/html; charset=utf-8")
            elif voter and what == ["items"]:
                mine = {row["id"]: row["choice"] for row in read(path) if row["voter"] == voter}
                order = sorted(items, key=lambda item: draw(seed, voter, item.id, "order"))
                rows = [{"id": i.id, "caption": i.caption, "choice": mine.get(i.id)} for i in order]
                self.answer(json.dumps(rows).encode())
            elif voter and what == ["results"]:
                self.answer(json.dumps(tally(read(path), items, baseline)).encode())
            elif voter and len(what) == 3 and what[0] == "picture" and what[1] in by_id and what[2] in CHOICES[:2]:
                item = by_id[what[1]]
                try:
                    self.answer(pixels(item.pictures[sides(item, voter, seed)[what[2]]]), "image/png")
                except ValueError as error:
                    self.answer(str(error).encode(), "text/plain", 404)
            else:
                self.answer(b"there is no such thing here", "text/plain", 404)

        def do_POST(self):
            what, voter = self.asked()
            try:
                # A page of another site can send no JSON without asking first.
                assert self.headers.get_content_type() == "application/json" and what == ["vote"] and voter
                row = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), 10_000)))
                item, choice = by_id[row["id"]], row["choice"]
                assert choice in CHOICES
            except (AssertionError, ValueError, TypeError, KeyError):
                return self.answer(b"not a vote", "text/plain", 400)
            stood = sides(item, voter, seed)
            models = {side: (baseline, item.candidate)[which] for side, which in stood.items()}
            winner = "tie" if choice == "tie" else ("baseline", "candidate")[stood[choice]]
            row = {"voter": voter, "id": item.id, "caption": item.caption, **models, "choice": choice}
            row |= {"winner": winner, "seed": seed}
            with lock:
                votes.write({**row, "time": time.strftime("%Y-%m-%d %H:%M:%S")})
            self.answer(b"{}")

        def asked(self) -> tuple[list[str], str]:
            """Return the path's parts and the voter; neither, for a request that was meant for another host."""
            url = urlsplit(self.path)
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in ("127.0.0.1", "localhost"):
                return [], ""
            voter = " ".join(parse_qs(url.query).get("voter", [""])[0].split())
            return url.path[1:].split("/"), voter if voter.isprintable() and len(voter) <= MAX_NAME else ""

        def answer(self, content: bytes, kind="application/json", status=200):
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": len(content),
                "Cache-Control": "no-store",
            }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


# --- what the votes say ---


def read(path: Path) -> list[dict]:
    """Return the votes that are there."""
    fields = dict.fromkeys(("voter", "id", "choice", "winner"), str)
    return list(jsonl.read(path, fields)) if path.exists() else []


def tally(votes: list[dict], items: list[Item], baseline: str) -> dict:
    """Return, for each candidate, its win rate over the baseline with interval, and how far the voters agree.

    A prompt's share is the mean of its votes (win 1, tie 1/2, loss 0) and prompts count alike, so that n is the number of
    prompts and not of votes. The interval is Jeffreys' of a proportion, 95 %.
    """
    of_item = {item.id: item for item in items}
    last = {(row["voter"], row["id"]): row for row in votes}
    counted = [row for row in last.values() if row["id"] in of_item]
    rows = []
    for candidate in dict.fromkeys(item.candidate for item in items):
        units: dict[str, list[float]] = {}
        for row in counted:
            if of_item[row["id"]].candidate == candidate:
                share = {"candidate": 1.0, "tie": 0.5}.get(row["winner"], 0.0)
                units.setdefault(row["id"], []).append(share)
        if not units:
            continue
        prompts: dict[str, list[float]] = {}
        for unit, shares in units.items():
            prompts.setdefault(of_item[unit].caption, []).append(np.mean(shares))
        n, every = len(prompts), [share for shares in units.values() for share in shares]
        won = float(sum(np.mean(shares) for shares in prompts.values()))
        agreement, alpha = agree(list(units.values()))
        rows.append(
            {
                "label": candidate,
                "win_rate": won / n,
                "interval": proportion_interval(won, n),
                "wins": every.count(1.0),
                "ties": every.count(0.5),
                "losses": every.count(0.0),
                "prompts": n,
                "agreement": agreement,
                "alpha": alpha,
            }
        )
    voters = dict.fromkeys(sorted(row["voter"] for row in counted), 0)
    for row in counted:
        voters[row["voter"]] += 1
    return {
        "labels": [baseline, *dict.fromkeys(item.candidate for item in items)],
        "rows": rows,
        "voters": [{"name": name, "votes": count} for name, count in voters.items()],
        "foreign": len(last) - len(counted),
    }


def proportion_interval(won: float, n: int) -> list[float]:
    """Return Jeffreys' 95 % interval of a proportion, which takes half wins (Brown, Cai and DasGupta 2001, section 3.1)."""
    low, high = stats.beta.ppf([0.025, 0.975], won + 0.5, n - won + 0.5)
    return [0.0 if won == 0 else float(low), 1.0 if won == n else float(high)]


def agree(units: list[list]) -> tuple[float | None, float | None]:
    """Return the share of equal answers among all two voters of a pair, and Krippendorff's alpha (nominal).

    `units` holds each pair's answers. Either is None where nothing can be said: nobody shared a pair, or all said the same.
    """
    shared = [unit for unit in units if len(unit) > 1]
    if not shared:
        return None, None
    counts = np.array([[unit.count(answer) for answer in (0.0, 0.5, 1.0)] for unit in shared], float)
    voters = counts.sum(1)
    same = (counts * (counts - 1)).sum(1)
    observed = 1 - (same / (voters - 1)).sum() / voters.sum()
    total = counts.sum(0)
    expected = 1 - (total * (total - 1)).sum() / (total.sum() * (total.sum() - 1))
    agreement = same.sum() / (voters * (voters - 1)).sum()
    return float(agreement), float(1 - observed / expected) if expected else None
