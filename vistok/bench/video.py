"""Frames of a video, evenly spaced; however long it is, none but those are held in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Clip:
    """What is shown of a video."""

    frames: tuple[Image.Image, ...]
    """RGB, in their order; one that was chosen twice is there twice."""
    indices: tuple[int, ...]
    """Which of the video's ``total`` frames each is."""
    total: int
    fps: float | None = None
    """Frames a second of the video; None: not known."""

    def pixels(self) -> np.ndarray:
        """(T, H, W, 3) uint8; frames of another size than the first are brought to it."""
        size = self.frames[0].size
        return np.stack([np.asarray(frame if frame.size == size else frame.resize(size)) for frame in self.frames])

    def metadata(self) -> dict[str, Any]:
        """What the video processors of transformers ask for, to tell at what time a frame was."""
        width, height = self.frames[0].size
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps if self.fps else None,
            "frames_indices": list(self.indices),
            "width": width,
            "height": height,
        }


def evenly(total: int, count: int) -> tuple[int, ...]:
    """``count`` places of ``total``, from the first to the last; some twice where there are fewer."""
    return tuple(np.linspace(0, total - 1, count).astype(int).tolist())


def clip_of(shown: Any, count: int) -> Clip:
    """``count`` frames of a video, however it is given.

    ``shown``: a path; a mapping with a path as "url", "path" or "video" and maybe "video_start" and "video_end" in
    seconds; or its frames: a sequence of pictures, of their paths or of (H, W, 3) uint8 arrays. Raises ValueError for
    what cannot be read, with the file's name, and ImportError without PyAV.
    """
    start, end = None, None
    if isinstance(shown, Mapping):
        start, end = shown.get("video_start"), shown.get("video_end")
        shown = next((shown[key] for key in ("url", "path", "video") if shown.get(key) is not None), None)
    if isinstance(shown, (str, PathLike)):
        return read(Path(shown), count, start, end)
    if not (isinstance(shown, Sequence) or (hasattr(shown, "shape") and len(shown.shape) == 4)) or not len(shown):
        raise ValueError(f"video: got {type(shown).__name__}, must be a path or a sequence of one or more frames")
    if start is not None or end is not None:
        raise ValueError("video_start, video_end: got frames, must come with a path")
    places = evenly(len(shown), count)
    frames = {place: _picture(shown[place]) for place in set(places)}
    return Clip(tuple(frames[place] for place in places), places, len(shown))


def _picture(frame: Any) -> Image.Image:
    if isinstance(frame, (str, PathLike)):
        frame = Image.open(frame)
    if isinstance(frame, Image.Image):
        return frame.convert("RGB")
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"video: got a frame {array.dtype} {array.shape}, must be a picture or (H, W, 3) uint8")
    return Image.fromarray(array)


def read(path: Path, count: int, start: float | None = None, end: float | None = None) -> Clip:
    """``count`` frames of the video file ``path``, between ``start`` and ``end`` seconds where they are given.

    The file is gone through once without decoding, so that its frames are counted and not guessed from its header; then
    only the stretches from a key frame to a wanted frame are decoded. ``indices`` and ``total`` count from ``start``.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('video: reading a file needs PyAV: pip install "vistok[video]"') from error
    if not path.is_file():
        raise ValueError(f"video: {path} is no file")
    try:
        with av.open(str(path), options={"fflags": "+genpts"}) as container:
            if not container.streams.video:
                raise ValueError(f"video: {path} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # threads that take a frame each would hold as many frames
            times, keys = _times(container, stream)
            tick = float(stream.time_base)
            since = times[0] if times else 0
            inside = [
                t
                for t in times
                if (start is None or (t - since) * tick >= start) and (end is None or (t - since) * tick <= end)
            ]
            if not inside:
                cut = f" from second {start or 0} to {'the end' if end is None else end}" if times else ""
                raise ValueError(f"video: {path} holds no frame{cut}")
            places = evenly(len(inside), count)
            found = _decoded(container, stream, sorted({inside[place] for place in places}), keys)
            if missing := [place for place in places if inside[place] not in found]:
                raise ValueError(f"video: {path} is corrupt, frame {missing[0]} of {len(inside)} cannot be decoded")
            fps = float(stream.average_rate) if stream.average_rate else None
    except av.FFmpegError as error:
        raise ValueError(f"video: {path} cannot be read, it is corrupt or of an unknown format: {error}") from error
    return Clip(tuple(found[inside[place]] for place in places), places, len(inside), fps)


def _times(container: Any, stream: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ascending, in ticks of the stream: when each frame is shown; of each key frame that, and when it is decoded."""
    times, keys = [], []
    for packet in container.demux(stream):
        time = packet.dts if packet.pts is None else packet.pts
        if time is None or not packet.size or packet.is_discard:
            continue
        times.append(time)
        if packet.is_keyframe:
            keys.append((time, time if packet.dts is None else min(time, packet.dts)))
    times.sort()
    return times, sorted(keys) or [(time, time) for time in times[:1]]


def _decoded(
    container: Any, stream: Any, wanted: Sequence[int], keys: Sequence[tuple[int, int]]
) -> dict[int, Image.Image]:
    """The first frame at or after each of the ascending times ``wanted``; what is not there is left out."""
    found: dict[int, Image.Image] = {}
    shown = [time for time, _ in keys]
    for key, group in groupby(wanted, lambda time: max(0, bisect_right(shown, time) - 1)):
        left = list(group)
        # Where a format has no index, a jump may end beyond the key frame: then from one before.
        frame = None
        while key >= 0:
            container.seek(keys[key][1], stream=stream)
            frames = (frame for frame in container.decode(stream) if _time(frame) is not None)
            frame = next(frames, None)
            if frame is not None and _time(frame) <= left[0]:
                break
            key -= 1
        while frame is not None and left:
            if _time(frame) >= left[0]:
                found[left.pop(0)] = _upright(frame)
            else:
                frame = next(frames, None)
    return found


def _time(frame: Any) -> Any:
    return frame.dts if frame.pts is None else frame.pts


def _upright(frame: Any) -> Image.Image:
    picture = frame.to_image()
    turned = getattr(frame, "rotation", 0)  # old versions of PyAV do not tell
    return picture.rotate(turned, expand=True) if turned else picture
