"""What an adapter must pass before a name means it: verification, the server's terms, and on request a comparison."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec

from adapters_store.catalog import Catalog, Found
from adapters_store.declared_base import difference, is_known, remarks
from adapters_store.errors import AdapterError, GivenUp, InvalidManifest, UnsupportedAdapter, WrongBase
from adapters_store.manifest import PLAIN, Manifest
from adapters_store.records import Content, Parity, Version, Weights, ref_to
from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from adapters_store.verifier import Verifier, VerifierBusy, VerifierClosed
from adapters_store.verify import Job, Verified
from server.errors import Overloaded, ShuttingDown
from server.lifecycle.engine import Engine
from server.lifecycle.registry import Registry
from server.lifecycle.terms import Terms
from server.lifecycle.wish import Wish

CHECK_TOKENS = 16  # that a check computes through both paths
CHECK_TIMEOUT_S = 60.0  # requests that wait for adapters come first


class Inspection:
    def __init__(
        self,
        registry: Registry,
        rules: Rules,
        verifier: Verifier,
        engine: Engine,
        terms: Terms,
        base_id: Callable[[], Awaitable[str]],
        check_template: Callable[[str], object],
    ) -> None:
        """`base_id` reads the base's weights the first time; `check_template` raises InvalidManifest."""
        self.registry, self.rules, self.terms, self.verifier = registry, rules, terms, verifier
        self._engine, self._base_id, self._check_template = engine, base_id, check_template

    @property
    def catalog(self) -> Catalog:
        return self.registry.catalog

    @asynccontextmanager
    async def verified(self, wish: Wish) -> AsyncIterator[tuple[Verified, Version]]:
        """The files verified and stored, while nothing of them may be removed."""
        async with self.registry.desk() as desk:
            verified = await self._verify(wish.job(desk))
            manifest = wish.manifest or verified.manifest or PLAIN
            self._check_base(verified.declared_base)
            await self._check_terms(wish.name, verified.weights, manifest)
            if wish.verify:
                verified = await self._compared_first(wish.name, verified)
            root, now = wish.root or verified.root, int(time.time())
            revision = verified.weights.revision
            yield verified, Version(revision, root, now, manifest, verified.declared_base, verified.notes)

    async def _verify(self, job: Job) -> Verified:
        try:
            return await self.verifier.verify(job)
        except VerifierBusy:
            raise Overloaded("as many adapters wait to be verified as may; try again later") from None
        except VerifierClosed:
            raise ShuttingDown from None

    def _check_base(self, declared: str | None) -> None:
        known = self.terms.base_names
        if self.terms.strict_base and declared is not None and not is_known(declared, known):
            raise UnsupportedAdapter(
                f"{difference(declared, known)} The server was started with --strict-base; if both are the same model, "
                "start it with --base-name and the adapter's name for it"
            )

    async def _check_terms(self, name: str, weights: Weights, manifest: Manifest) -> None:
        if manifest.has_expired(time.time()):
            raise InvalidManifest(f"expires_at is {manifest.expires_at}, which has passed; it is in Unix seconds")
        if manifest.chat_template is not None:
            await asyncio.to_thread(self._check_template, manifest.chat_template)
        if manifest.pinned:
            self.check_pins(name, weights)
        if manifest.base_id is not None and manifest.base_id != (base_id := await self._base_id()):
            raise WrongBase(
                f"its manifest demands the base {manifest.base_id}; this server's base is {base_id} (heddle base-id)"
            )

    def check_pins(self, name: str, weights: Weights) -> None:
        """Raises InvalidManifest if there is no room to pin these too. No I/O: what is planned can ask."""
        pinned = self.catalog.pinned
        others = [
            it for record in pinned if record.name != name and (it := self.catalog.weights(record.current.revision))
        ]
        num_bytes = weights.num_bytes + sum(it.num_bytes for it in others)
        if num_bytes > self.terms.most_pinned_bytes or len(others) + 1 > self.terms.most_pinned:
            raise InvalidManifest(
                f"{len(others) + 1} pinned adapters would have {num_bytes:,} bytes; pinned may be at most "
                f"{self.terms.most_pinned} of together {self.terms.most_pinned_bytes:,} bytes, so that there is room "
                "for the others: raise --adapter-bytes, or pin fewer"
            )

    async def _compared_first(self, name: str, verified: Verified) -> Verified:
        """The same with what the comparison found. The engine is told of weights that no name means yet."""
        ref = ref_to(name, verified.weights)
        with self.registry.candidate(verified.weights, verified.content):
            parity, fault = await self.compared(ref)
        if not self.catalog.is_used(ref.revision):
            await self._engine.remove_adapter(ref)  # what it knows now lies elsewhere soon, or is gone
        weights = msgspec.structs.replace(verified.weights, parity=parity, fault=fault)
        return msgspec.structs.replace(verified, weights=weights)

    async def compared(self, ref: AdapterRef) -> tuple[Parity | None, str | None]:
        """What there is to say of it, and why it is in quarantine, if it is."""
        if self._engine.is_given_up(ref):
            self._engine.add_adapter(ref)  # else it would not look at it again
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                checked = await self._engine.check_adapter(ref, CHECK_TOKENS)
        except TimeoutError:
            raise Overloaded(
                f"within {CHECK_TIMEOUT_S:g} s there was no room on the device to compare the adapter with merged "
                "weights; try again later"
            ) from None
        if checked.max_difference is None or checked.max_logit is None:
            return None, f"it could not be compared with merged weights: {checked.error}"
        bound = self.terms.parity_bound * max(1.0, checked.max_logit)
        parity = Parity(checked.max_difference, bound, checked.max_logit, CHECK_TOKENS, int(time.time()))
        if checked.max_difference <= bound:
            return parity, None
        return parity, (
            f"its logits differ by up to {checked.max_difference:.3g} from those of merged weights, where at most "
            f"{bound:.3g} is allowed (--verify-bound)"
        )

    async def read_stored(self, found: Found, content: Content) -> Verified:
        """The adapter out of the store, every byte of it. Raises AdapterError."""
        root = str(self.registry.store.blobs.root.resolve())
        job = self.rules.job_below((root,), found.record.name, found.weights.ignored)
        async with self.registry.desk() as desk:
            return await self._verify(msgspec.structs.replace(job, stored=content.files, desk=desk.paths))

    async def read_again(self, found: Found) -> Verified | str:
        """The adapter out of the store, every byte of it; or what is wrong with it."""
        content = await self.registry.content(found.weights.revision)
        try:
            read = await self.read_stored(found, content)
        except GivenUp:  # which says nothing of the files
            raise
        except AdapterError as error:
            return f"{error}: register it again"
        if read.weights.revision != found.weights.revision:
            return "what is in the store is not what was stored: register it again"
        return read

    def warnings_for(self, found: Found) -> list[str]:
        """What is served and may still not be what was meant, in sentences."""
        told = remarks(found.version.declared_base, self.terms.base_names)
        weights, limit = found.weights, self.terms.graph_rank
        if limit is not None and weights.max_rank > limit:
            told.append(
                f"The adapter's rank {weights.max_rank} is above {limit}, the highest that decodes are captured for: "
                "every step with one of its requests launches its kernels one by one, and the requests beside it wait "
                f"too; --max-rank {weights.max_rank} captures it."
            )
        return told
