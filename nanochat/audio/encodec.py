"""EnCodec (Defossez et al. 2022) by way of transformers: a pretrained neural codec behind audio.py's interface."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nanochat.audio.codec_files import check_codes, save_codec
from nanochat.checkpoint_files import weights_hash
from nanochat.data.hub import place_caches, probe
from nanochat.runtime import first_line
from nanochat.system.environment import UserError, expand_user

GROUP_SECONDS = 16  # of sound computed at a time: the activations of the full model take 50 MB a second
LONGEST_SECONDS = 60  # of one sound at a time, for the same reason; longer ones are coded in pieces


class EncodecCodec:
    """transformers' EncodecModel, mono, by a hub name or a local folder, with the first `codebooks` of its codebooks.

    It computes on a GPU where there is one; what it takes and gives is on the CPU.

    32 kHz: 50 frames a second, 4 codebooks of 2048. 24 kHz: 75 frames a second, 32 codebooks of 1024.
    UserError: not there (and the hub neither), not an EnCodec, stereo or chunked, or fewer codebooks than asked for.
    """

    def __init__(self, source: str, codebooks: int):
        model = _model(source)
        config = model.config
        self.name = self.source = source
        if Path(source).expanduser().is_dir():
            path = Path(source).expanduser().resolve()
            self.name, self.source = path.name, str(path)
        if config.audio_channels != 1 or config.chunk_length_s is not None or config.normalize:
            raise UserError(
                f"codec='encodec:{source}' is a stereo or chunked EnCodec, which codes loudness apart: take a mono one "
                "(facebook/encodec_24khz, facebook/encodec_32khz)"
            )
        counts = {rate: model.quantizer.get_num_quantizers_for_bandwidth(rate) for rate in config.target_bandwidths}
        most = max(counts.values())
        if not 1 <= codebooks <= most:
            raise UserError(
                f"codec='encodec:{source}' has {most} codebooks, not {codebooks}: --codebooks={most} or fewer"
            )
        # Each codebook codes what the ones before left over, so the first Q of more are what Q would be.
        self._bandwidth = min(rate for rate, count in counts.items() if count >= codebooks)
        self._model, self._hop = model, int(np.prod(config.upsampling_ratios))
        self.sample_rate, self.codebooks, self.codes = config.sampling_rate, codebooks, config.codebook_size
        self.frame_rate = self.sample_rate / self._hop
        self.hash = weights_hash({f"encodec-1/{codebooks}/{key}": value for key, value in model.state_dict().items()})
        self.device = pick_codec_device()
        model.to(self.device)

    def encode(self, wav: np.ndarray | torch.Tensor) -> np.ndarray:
        """float32 [samples] -> int64 [Q, T], T = ceil(samples / hop) and at least 1."""
        return self.encode_batch(np.asarray(wav)[None])[0]

    def decode(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """[Q, T] -> float32 [T * hop]. UserError for another Q and for codes outside 0 .. K-1."""
        return self.decode_batch(np.asarray(codes)[None])[0]

    @torch.no_grad()
    def encode_batch(self, wavs: np.ndarray | torch.Tensor) -> np.ndarray:
        """float32 [B, samples] -> int64 [B, Q, T]; sounds over LONGEST_SECONDS are coded in pieces."""
        wavs = torch.from_numpy(np.array(wavs, dtype=np.float32))[:, None]
        wavs = torch.nn.functional.pad(wavs, (0, max(0, self._hop - wavs.shape[2])))
        return torch.cat([self._in_groups(self._encode, part) for part in wavs.split(self._longest(), 2)], 2).numpy()

    @torch.no_grad()
    def decode_batch(self, codes: np.ndarray | torch.Tensor) -> np.ndarray:
        """[B, Q, T] -> float32 [B, T * hop]; UserError as in decode."""
        parts = check_codes(codes, self).split(self._longest() // self._hop, 2)
        return torch.cat([self._in_groups(self._decode, part) for part in parts], 1).numpy()

    def _encode(self, wavs: torch.Tensor) -> torch.Tensor:
        return self._model.encode(wavs, bandwidth=self._bandwidth).audio_codes[0, :, : self.codebooks]

    def _decode(self, codes: torch.Tensor) -> torch.Tensor:
        return self._model.decode(codes[None], [None]).audio_values[:, 0, : codes.shape[2] * self._hop]

    def _in_groups(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """The function of GROUP_SECONDS of sound at a time, on the codec's device; batch and result are on the CPU."""
        samples = batch.shape[2] * (1 if function == self._encode else self._hop)
        groups = batch.split(max(1, GROUP_SECONDS * self.sample_rate // samples))
        return torch.cat([function(group.to(self.device)).cpu() for group in groups])

    def _longest(self) -> int:
        """Samples of a piece: whole frames."""
        return LONGEST_SECONDS * self.sample_rate // self._hop * self._hop

    def save(self, directory: Path | str) -> Path:
        """Write codec.json, which refers to the model by name or folder, and by hash; audio.load_codec opens it again.

        UserError when the folder already holds another codec.
        """
        return save_codec(Path(directory), self, source=self.source)


def pick_codec_device() -> torch.device:
    """The current GPU, or the CPU. Apple's GPUs lack convolutions of this length."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _model(source: str):
    """The EncodecModel of a local folder or a hub name, from the local cache where it is there."""
    place_caches()
    try:
        from transformers import AutoConfig, EncodecModel
    except ImportError as error:
        raise UserError(f"codec='encodec:{source}' needs transformers: pip install -e '.[hf]'") from error
    folder = expand_user(source, "codec")
    place = str(folder) if folder.is_dir() else source
    wrong = (OSError, ValueError, RuntimeError, KeyError, TypeError)  # what transformers raises, by what is wrong

    def load(local: bool):
        options = dict(local_files_only=local, trust_remote_code=False)  # without it, it would ask the user
        if (kind := AutoConfig.from_pretrained(place, **options).model_type) != "encodec":
            raise UserError(f"codec='encodec:{source}' is a model of type {kind}, not an EnCodec")
        return EncodecModel.from_pretrained(
            place, local_files_only=local, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )

    try:
        model, loading = load(local=True)
    except UserError:
        raise
    except wrong as error:
        if folder.is_dir():
            raise UserError(f"codec='encodec:{source}': the folder cannot be read ({first_line(error)})") from error
        try:
            probe(f"codec='encodec:{source}'")
            model, loading = load(local=False)
        except (UserError, *wrong) as error:
            raise UserError(
                f"{first_line(error)}; EnCodec is found by a hub name such as encodec:facebook/encodec_32khz, or in a "
                "folder with its config.json and model.safetensors, copied from a machine with network: encodec:FOLDER"
            ) from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"codec='encodec:{source}' lacks {len(missing)} tensors, {missing[0]} first: fetch it again")
    return model.eval()
