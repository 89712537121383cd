"""What faster graphs cost on a user's own documents: certificate.json, beside a bundle's files and no part of them.

jql-export --certify writes it, jql-run --max-flips reads it. It names the bundle by its hash, so that a bundle which
was exported again is not taken for the one that was measured, and a bundle that gets a certificate stays the same one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from jql_engine.bundle import Bundle, WindowsInfo
from jql_engine.errors import BundleError
from jql_engine.fields import decode

CERTIFICATE = "certificate.json"
FORMAT = 1
REFERENCE_BF16 = "PyTorch in bf16"  # what the original pipeline computes
CUT = 0.6  # the quantile, of every head, at which documents are kept or not
HOW = (
    "make one with jql-export --certify CORPUS --bundle BUNDLE --encoder E --head NAME=FILE ..., the encoder and heads "
    "that it was made of"
)


@dataclass(frozen=True, slots=True)
class FlipShare:
    """Of documents that change sides at CUT, by one head or under the rule that all heads must agree."""

    what: str
    share: float
    upper: float  # end of the interval that holds the share with 95 % confidence


@dataclass(frozen=True, slots=True)
class Certified:
    """What was found of one graph."""

    flips: list[FlipShare]

    @property
    def worst(self) -> FlipShare:
        """The largest by its interval's upper end."""
        return max(self.flips, key=lambda one: one.upper)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the runtime needs of certificate.json; there is more in it."""

    format: int
    bundle: str  # hash
    documents: int
    cut: float
    windows: WindowsInfo  # of the documents that were scored
    reference_bf16: Certified  # of PyTorch in bf16, which the original pipeline computes
    variants: dict[str, Certified]

    def reason_against(self, variant: str, max_flips: float) -> str | None:
        """Why a graph is not as close to the fp32 reference as asked; None where it is."""
        if variant not in self.variants or not self.variants[variant].flips:
            return f"{CERTIFICATE} does not say what it decides differently: {HOW}, on a machine that runs it"
        worst = self.variants[variant].worst
        if worst.upper <= max_flips:
            return None
        return (
            f"of {self.documents:,} documents {worst.share:.3%} change sides by {worst.what}, up to {worst.upper:.3%} "
            f"with 95 % confidence, allowed are {max_flips:.3%}"
            + ("; certify more --documents, or allow more" if worst.share <= max_flips else "")
        )


def read_certificate(bundle: Bundle) -> Certificate:
    """The certificate of `bundle`; raises BundleError where there is none, or another bundle's."""
    file = bundle.path / CERTIFICATE
    try:
        found: Certificate = decode(Certificate, json.loads(file.read_text(encoding="utf-8")), "certificate")
    except FileNotFoundError as error:
        raise BundleError(f"{bundle.path} has no {CERTIFICATE}, which --max-flips needs: {HOW}") from error
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is damaged: {error}; {HOW}") from error
    if found.format != FORMAT:
        raise BundleError(f"{file} has format {found.format}, this jql-engine reads {FORMAT}: {HOW}")
    if found.bundle != bundle.hash:
        raise BundleError(
            f"{file} is of bundle {found.bundle[:12]}, and this is {bundle.hash[:12]}: it was exported again; {HOW}"
        )
    if found.windows != (wanted := bundle.manifest.windows):
        raise BundleError(
            f"{file} is of windows {found.windows.take}, aggregate {found.windows.aggregate}; {wanted.take}, "
            f"{wanted.aggregate} are asked for, and nothing is known of those: leave out --windows and --aggregate"
        )
    return found
