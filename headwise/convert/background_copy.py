"""Copy or transform every tensor outside the converted layers, as far as possible while layers are converted."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from headwise.convert.base import Target
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor, Writer
from headwise.progress import Progress


class BackgroundCopy:
    """Write the tensors outside the converted layers.

    A thread copies those that stay as they are, or are scaled, chunk by chunk: reading, computing, hashing and
    writing release the interpreter lock. Tensors that are computed as a whole wait for `finish`, when no layer is
    in memory. Use it as a context manager: leaving it ends the copy after the tensor that is being written.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        writer: of the output folder.
    """

    def __init__(self, checkpoint: Checkpoint, target: Target, writer: Writer) -> None:
        self._checkpoint, self._target, self._writer = checkpoint, target, writer
        layers = {n for i in range(len(target.layouts)) for n in target.converted_names(i)}
        done = layers | writer.done
        self._rest = [tensor for tensor in target.outputs if tensor.name not in done]
        self._thread = ThreadPoolExecutor(1, "copy")
        self._copies: dict[str, Future[None]] = {}

    def __enter__(self) -> BackgroundCopy:
        for tensor in self._rest:
            by_chunks = tensor.source is not None or tensor.name in self._target.scaled
            if self._checkpoint.is_plain and by_chunks and not tensor.stored and not tensor.exponent:
                self._copies[tensor.name] = self._thread.submit(self._write, tensor)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def finish(self, progress: Progress) -> None:
        """Wait for the copies, write what is computed, and copy the sidecar files.

        Args:
            progress: gets one stage that counts bytes.

        Raises:
            HeadwiseError: a tensor cannot be read or written, or holds a NaN or an infinity.
        """
        progress.stage("Copying", total=sum(tensor.nbytes for tensor in self._rest), unit="bytes")
        for tensor in self._rest:
            if tensor.name in self._copies:
                self._copies[tensor.name].result()
            else:
                self._write(tensor)
            progress.advance(tensor.nbytes)
        for path in self._checkpoint.sidecars:
            self._writer.add_file(path, path.relative_to(self._checkpoint.folder).as_posix())

    def _write(self, tensor: OutputTensor) -> None:
        if tensor.source is not None:
            self._writer.copy(tensor.name, self._checkpoint)
        elif (scaled := self._target.scaled.get(tensor.name)) is not None:
            self._writer.write_chunks(tensor.name, scaled.chunks(self._checkpoint, tensor.dtype))
        else:
            self._writer.write(tensor.name, self._target.transform_other(tensor.name, self._checkpoint))
