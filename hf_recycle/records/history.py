"""What happened in a run, as users see it: tables of events, counts, magnitudes and logs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from hf_recycle.errors import UserError
from hf_recycle.hub.address import locate
from hf_recycle.hub.explain import explain, is_maybe_a_folder
from hf_recycle.hub.fetch import fetch_file
from hf_recycle.records.file_checks import RecyclingFileError, fail
from hf_recycle.records.file_set import read_files
from hf_recycle.records.files import CONFIG_FILE, RECYCLING_FILES
from hf_recycle.records.recorder import ACTIVITY_METRICS, activity_rows, metric_values, rows_of_kind
from hf_recycle.records.untrusted.recycling_files import check_content, check_expansion


class RecyclingHistory:
    """What happened to a model's neurons up to one checkpoint. Made by `from_pretrained`.

    Attributes:
        config: the content of `recycling_config.json`: arguments, package version, blocks.
        stats: the content of `recycling_stats.json`, see `summarize`.
        table: every record, with `recorder.HISTORY_SCHEMA`.
        folder: where its files were found, or None.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        table: pa.Table,
        stats: Mapping[str, Any],
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.stats = stats
        self.table = table
        self._tensors = tensors

    @classmethod
    def from_pretrained(
        cls, folder_or_repo_id: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> RecyclingHistory:
        """Read the recycling files of a checkpoint and check them, also against each other.

        Args:
            folder_or_repo_id: a checkpoint, a run's output folder (its newest complete checkpoint is read
                unless it holds the files itself), or a repository of the Hub (only the small files are
                downloaded) by its name or as `hf://user/repo[@revision][/folder]`.
            revision: branch, tag or commit of the repository.
            token: token for a private repository.

        Raises:
            RecyclingFileError: nothing is found there, or a file is damaged or contradicts another, or holds what no
                run can have written.
        """
        if os.path.isdir(folder_or_repo_id):
            folder, content = read_files(folder_or_repo_id, lambda path: _bounded(find_checkpoint(path)))
        else:
            folder, content = read_files(_download(os.fspath(folder_or_repo_id), revision, token), _bounded)
        check_content(folder, *content)
        return cls(*content, folder=folder)

    @classmethod
    def of_own_run(cls, folder: str | os.PathLike[str]) -> RecyclingHistory:
        """Read the recycling files that this process, or another one of the same user's, has written into a folder.

        Raises:
            RecyclingFileError: a file is missing or damaged, or contradicts another.
        """
        folder, content = read_files(folder, find_checkpoint)
        return cls(*content, folder=folder)

    @property
    def blocks(self) -> list[str]:
        """Names of the FF blocks, in the model's order."""
        return [block["name"] for block in self.config["blocks"]]

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Times each neuron was recycled: {block: int32 (d_ff,)}, in the model's order of blocks."""
        return {block: self._tensors[f"{block}/counts"].numpy() for block in self.blocks}

    @cached_property
    def ages(self) -> dict[str, np.ndarray]:
        """Optimizer steps since each neuron was last recycled, or added by a resize, -1 for never.

        {block: int64 (d_ff,)}.
        """
        last = {block: self._tensors[f"{block}/last_step"].numpy() for block in self.blocks}
        return {block: np.where(steps > 0, self.stats["step"] - steps, -1) for block, steps in last.items()}

    @cached_property
    def events(self) -> pd.DataFrame:
        """One row per selection phase and block.

        Columns: step, phase, block, recycled (list of int), eligible, requested, note.
        """
        columns = ["step", "phase", "block", "recycled", "eligible", "requested", "note"]
        return _frame(rows_of_kind(self.table, "phase"), columns)

    @cached_property
    def pruned(self) -> dict[str, np.ndarray]:
        """Pruned neurons: {block: bool (d_ff,)}, in the model's order of blocks."""
        sizes = {block["name"]: block["num_neurons"] for block in self.config["blocks"]}
        absent = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
        return {name: self._tensors.get(f"{name}/pruned", absent[name]).numpy() for name in self.blocks}

    @cached_property
    def prunings(self) -> pd.DataFrame:
        """One row per pruning and block that had neurons to prune.

        Columns: step, block, pruned (list of int), eligible, requested, note.
        """
        return _frame(rows_of_kind(self.table, "pruning"), ["step", "block", "pruned", "eligible", "requested", "note"])

    @cached_property
    def resizes(self) -> pd.DataFrame:
        """One row per change of width and block. Rows of other tables name neurons by their places at that step.

        Columns: step, block, neurons (before), former (list of int: which one each neuron was, -1 if added), note.
        """
        rows = rows_of_kind(self.table, "resize")
        frame = _frame(rows, ["step", "block", "eligible", "recycled", "note"])
        return frame.rename(columns={"eligible": "neurons", "recycled": "former"})

    @cached_property
    def overtrainings(self) -> pd.DataFrame:
        """One row per overtraining. Columns: step, and `recorder.OVERTRAINING_METRICS`."""
        return _metrics_frame(self.table, "overtraining")

    @cached_property
    def magnitudes(self) -> pd.DataFrame:
        """One row per recorded histogram of a block's neuron magnitudes.

        Columns: step, block, quantiles (list of 11 floats at `recorder.QUANTILE_LEVELS`), histogram (list of
        64 neuron counts), edges (list of 65 floats), note. Lists are empty where no magnitude was finite.
        """
        columns = ["step", "block", "quantiles", "histogram", "edges", "note"]
        return _frame(rows_of_kind(self.table, "magnitude"), columns)

    @cached_property
    def activity(self) -> pd.DataFrame:
        """One row per probe and block: how many neurons were idle on its batches.

        Columns: step, block, and `recorder.ACTIVITY_METRICS`.
        """
        return pd.DataFrame(activity_rows(self.table), columns=["step", "block", *ACTIVITY_METRICS])

    @cached_property
    def logs(self) -> pd.DataFrame:
        """Logged numbers: one row per step that logged, one column per name (NaN where it was not logged).

        Where a step logged a name twice, the later value counts.
        """
        return _metrics_frame(self.table, "log")


def _metrics_frame(table: pa.Table, kind: str) -> pd.DataFrame:
    series = {}
    for name, (steps, values) in metric_values(table, kind).items():
        one = pd.Series(values, index=pd.Index(steps, name="step"))
        series[name] = one[~one.index.duplicated(keep="last")]
    if not series:
        return pd.DataFrame({"step": np.zeros(0, np.int64)})
    frame = pd.DataFrame(series).sort_index()
    frame.insert(0, "step", frame.index.astype(np.int64))
    return frame.reset_index(drop=True)


def find_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds the recycling files: `folder`, or its newest `checkpoint-N` that has all of them.

    Raises:
        RecyclingFileError: there is no such folder, with what is missing.
    """
    folder = Path(folder)
    missing = _missing(folder)
    if not missing:
        return folder
    if not folder.is_dir():
        fail(folder, "there is no such folder any more", "name the run's folder, whose newest checkpoint is then read")
    if len(missing) < len(RECYCLING_FILES):
        fail(folder, f"{', '.join(missing)} is missing beside the other recycling files")
    found = [(int(match[1]), child) for child in folder.iterdir() if (match := _CHECKPOINT.match(child.name))]
    complete = [child for _, child in sorted(found) if not _missing(child)]
    if not complete:
        where = "its checkpoints hold no complete set either" if found else "it holds no checkpoints either"
        fail(folder, f"it has no {CONFIG_FILE}, and {where}", "name a folder that a RecyclingTrainer has saved")
    return complete[-1]


def _bounded(folder: str | os.PathLike[str]) -> Path:
    """The folder, once it is known that its files take no more to read than a run's."""
    check_expansion(Path(folder))
    return Path(folder)


_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})$")


def _missing(folder: Path) -> list[str]:
    return [name for name in RECYCLING_FILES if not (folder / name).is_file()]


def _download(text: str, revision: str | None, token: str | None) -> Path:
    """The folder of the Hub's cache that holds the recycling files of one commit of a repository."""
    try:
        repo, inside, revision = locate(text, revision)
    except UserError as error:
        raise RecyclingFileError(str(error)) from error
    where = f"{repo}@{revision}" if revision else repo
    folder = None
    for name in RECYCLING_FILES:
        try:
            path = fetch_file(repo, f"{inside}{name}", revision, token)
        except UserError as error:
            raise RecyclingFileError(str(error)) from error
        except Exception as error:  # the client lets the errors of its HTTP library through, whichever that is
            problem, remedy = explain(error, f"{inside}{name}")
            if is_maybe_a_folder(error):
                problem = f"it is no folder here{_similar(repo)}, and {problem}"
            fail(where, problem, remedy)
        if folder is None:
            folder = path.parent
            # The other files must come from the same commit, whatever is pushed meanwhile.
            commit = path.parents[inside.count("/")].name
            if re.fullmatch(r"[0-9a-f]{40}", commit):
                revision = commit
        elif path.parent != folder:
            fail(where, f"{name} comes from another commit than {CONFIG_FILE}", "try again")
    assert folder is not None, "there are files to read"
    return folder


def _similar(name: str) -> str:
    """A hint at a folder whose name is much like a mistyped one."""
    path = Path(name)
    if not path.parent.is_dir():
        return ""
    close = get_close_matches(path.name, [child.name for child in path.parent.iterdir() if child.is_dir()], n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _frame(rows: pa.Table, columns: list[str]) -> pd.DataFrame:
    """Columns of a history as pandas, with lists as Python lists."""
    frame = rows.select(columns).to_pandas()
    for column in columns:
        if pa.types.is_list(rows.schema.field(column).type):
            frame[column] = pd.Series(rows[column].to_pylist(), index=frame.index, dtype=object)
    return frame
