"""One click: calibrate a loaded MODEL, solve it, write the 4-bit file; everything resumes."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import comfy.model_management

from ..calibration import Samples
from ..checkpoint import TOOL, file_sha256, open_safetensors, quantization_info
from ..quantize import Event, Job, Report, parts_folder, quantize, refuse_overwriting
from .calibrate import CalibrationSettings, Conditioning, calibrate
from .model import ModelSource, file_of, hash_nested


def quantize_model(
    source: ModelSource,
    prompts: list[Conditioning],
    output: Path,
    job: Job,
    settings: CalibrationSettings,
    on_event: Callable[[Event], None],
) -> Report:
    """Quantize the model behind ``source`` into ``output``.

    A file that the same job wrote before is kept as it is. An interrupt (ComfyUI's exception) leaves the
    calibration and the solved layers in ``<output>.parts/``, where the next run finds them.
    """
    job.settings()  # refuse nonsense before the long part
    source.groups()
    fingerprint = source.fingerprint()
    calibration_key = key_of(fingerprint, prompts, settings)
    job_key = hashlib.sha256(repr((TOOL, calibration_key, job.fmt, job.settings())).encode()).hexdigest()
    source.origin["key"] = fingerprint.hex()
    refuse_overwriting(output, source)
    if output.exists() and (report := finished_before(output, job_key)):
        shutil.rmtree(parts_folder(output), ignore_errors=True)
        return report
    check = comfy.model_management.throw_exception_if_processing_interrupted
    kept = parts_folder(output) / f"{calibration_key[:32]}.calibration"
    if not kept.is_file():
        samples = calibrate(source, prompts, settings, on_event)
        samples.save(kept, {})
        del samples
    comfy.model_management.unload_all_models()  # solving needs the memory; the weights stay in RAM
    if path := file_of(source.model):
        on_event({"stage": "hash", "path": str(path)})
        source.origin["sha256"] = file_sha256(path, check)
    report = quantize(
        source,
        Samples.load(kept),  # memory-mapped
        output,
        job,
        device=comfy.model_management.get_torch_device(),
        calibration=settings.describe(len(prompts)),
        job_key=job_key,
        on_event=on_event,
        check=check,
    )
    shutil.rmtree(parts_folder(output), ignore_errors=True)  # Windows keeps mapped files until now
    return report


def key_of(fingerprint: bytes, prompts: list[Conditioning], settings: CalibrationSettings) -> str:
    """Hex digest of everything that decides what calibration sees."""
    digest = hashlib.sha256(fingerprint)
    digest.update(repr(settings).encode())
    for prompt in prompts:
        for context, options in prompt:
            hash_nested(context, digest.update)
            for name in sorted(options):
                digest.update(name.encode())
                hash_nested(options[name], digest.update)
    return digest.hexdigest()


def finished_before(output: Path, job_key: str) -> Report | None:
    """The report of an earlier run of the very same job, if there was one."""
    with open_safetensors(output) as file:
        metadata = dict(file.metadata() or {})
    if quantization_info(metadata).get("job_key") != job_key:
        return None
    return Report.of_file(output, metadata)
