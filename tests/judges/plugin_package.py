"""A small distribution as pip would have installed it: a module, and the metadata that names its judges."""

from __future__ import annotations

from pathlib import Path

MODULE = '''
"""Judges for sale."""

import asyncio

from online_po.types import Judgement


RATIONALES = {"one reason": ("short",), "no text": ("short", 3), "half": ("short \\ud83d", "short")}


class Brevity:
    """Short responses first."""

    def __init__(self, weight=1.0, *, give=None):
        if weight < 0:
            raise ValueError("no negative weights here")
        self.weight, self.give = weight, give

    async def judge(self, group):
        await asyncio.sleep(0)
        scores = tuple(-self.weight * len(response.text) for response in group.responses)
        if self.give == "hang":
            await asyncio.sleep(60)
        if self.give == "error":
            raise KeyError("k")
        if self.give == "text":
            return "good"
        if self.give == "short":
            return Judgement(prompt_id=group.prompt.id, scores=scores[:-1])
        if self.give == "other":
            return Judgement(prompt_id="another", scores=scores)
        if self.give in RATIONALES:
            return Judgement(prompt_id=group.prompt.id, scores=scores, rationales=RATIONALES[self.give])
        return Judgement(prompt_id=group.prompt.id, scores=scores, rationales=("short",) * len(scores))


def make_counter(letter):
    """Makes a scoring function."""

    def count(prompt, response, metadata):
        return response.count(letter)

    return count


def length(prompt, response, metadata, factor=1.0):
    return factor * len(response)


def number():
    return 7


class Scorer:
    @staticmethod
    def judge(group):
        return None


nothing = 3
'''
ENTRY_POINTS = """[online_po.judges]
brevity = judges_for_sale:Brevity
counter = judges_for_sale:make_counter
length = judges_for_sale:length
number = judges_for_sale:number
sync = judges_for_sale:Scorer
nothing = judges_for_sale:nothing
gone = judges_for_sale:gone
broken = judges_for_sale_no_more:judge

[console_scripts]
elsewhere = judges_for_sale:length
"""


def install(folder: Path, version: str = "1.2.3", name: str = "judges-for-sale") -> Path:
    """Writes the distribution into a folder, which must be on the search path to be seen; gives the folder."""
    (folder / "judges_for_sale.py").write_text(MODULE)
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder
