"""Methods of one model that a patch replaces: those of ``generate`` on which caches depend, and ``save_pretrained``."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

from .. import transformers_seam
from ..caches.static import FluxStaticCache
from ..forward_context import Held
from ..transformers_seam import CACHE, cache_of
from . import attention_function

if TYPE_CHECKING:
    from .model_patch import Patch

HELD_ROUTES = "flux_ext_routes"
"""The keyword with which ``generate`` hands the prompt's routes from forward to forward where no cache keeps them."""

REPLACEMENTS = {
    "_prepare_cache_for_generation": "prepare_cache",
    "_get_candidate_generator": "candidate_generator",
    "generate_batch": "refuse_continuous_batching",
    "init_continuous_batching": "refuse_continuous_batching",
    "continuous_batching_context_manager": "refuse_continuous_batching",
}
"""What stands in place of the methods that ``transformers_seam.REPLACED`` names."""


class ModelMethods:
    """The replacements, as attributes of this one model instance; each calls the method of the model's class.

    Raises:
        ImportError: transformers lacks one of the methods that are to be replaced.
    """

    def __init__(self, patch: Patch) -> None:
        self.patch, self.model = patch, patch.model
        replaced = transformers_seam.replaceable(self.model)
        self.methods: dict[str, Any] = {name: getattr(self, REPLACEMENTS[name]) for name in replaced}
        self.methods["set_attn_implementation"] = self.refuse_attn_implementation
        self.methods["save_pretrained"] = self.save_pretrained
        self.methods["create_masks_for_generate"] = self.masks_for_generate
        self.ignored_on_save = self.model._keys_to_ignore_on_save

    def install(self) -> None:
        """Puts them in place."""
        self._keep_routers_out_of(self.model.state_dict())
        for name, method in self.methods.items():
            setattr(self.model, name, method)

    def remove(self) -> None:
        """Undoes :meth:`install`, also one that ended half-way; what the model had of its own before stays."""
        for name, method in self.methods.items():
            if self.model.__dict__.get(name) is method:
                del self.model.__dict__[name]
        self.model._keys_to_ignore_on_save = self.ignored_on_save

    def prepare_cache(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """In place of ``_prepare_cache_for_generation``: a FluxCache where that would make a dynamic one."""
        patch = self.patch
        if generation_config.prefill_chunk_size is not None and patch.config.route_on == "prompt":
            raise ValueError(
                'prefill_chunk_size splits the prompt, but FluxConfig(route_on="prompt") decides from all of it; '
                'patch with route_on="first_chunk"'
            )
        cache = cache_of(model_kwargs)
        patch.check_cache(cache)
        if cache is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic", "static"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} is not supported by a "
                    "patched model; leave it out, or pass a flux_ext.FluxCache"
                )
            if generation_config.cache_implementation == "static":
                call = transformers_seam.arguments_of(
                    self.model, "_prepare_cache_for_generation", generation_config, model_kwargs, *args, **kwargs
                )
                cache = FluxStaticCache(self.model.config, patch.settings, call["max_cache_length"])
            else:
                cache = patch.new_cache()
            model_kwargs[CACHE] = cache
            if generation_config.is_assistant:
                cache.activate_past_recording()
        else:
            if cache is None:  # every forward has the prompt and the answer so far: the first one decides
                model_kwargs[HELD_ROUTES] = Held()
            type(self.model)._prepare_cache_for_generation(self.model, generation_config, model_kwargs, *args, **kwargs)

    def candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """In place of ``_get_candidate_generator``: the first forward will have candidates after the prompt."""
        call = transformers_seam.arguments_of(self.model, "_get_candidate_generator", *args, **kwargs)
        cache = cache_of(call["model_kwargs"])
        if cache.get_seq_length() == 0:
            cache.prompt_len = call["input_ids"].shape[1]
        return type(self.model)._get_candidate_generator(self.model, *args, **kwargs)

    def refuse_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("continuous batching (generate_batch) does not work on a patched model: use generate")

    def refuse_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"attn_implementation of a patched model must stay {attention_function.NAME!r}, not become "
            f"{attn_implementation!r}: call flux_ext.unpatch(model) to use another"
        )

    def masks_for_generate(self, config: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the model's, or transformers', ``create_masks_for_generate``: masks as this model's modules take
        them, though ``generate`` hands over ``model.config``."""
        return transformers_seam.masks_for_generate(self.model)(self.patch.configs.of(config), *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """In place of the model's: the plain model, and the routers beside it under names of their own.

        Raises:
            ValueError: the routers cannot be saved there, see :meth:`FluxRouters.save_pretrained`; nothing was written.
        """
        stock = type(self.model).save_pretrained
        call = inspect.signature(stock).bind(self.model, save_directory, *args, **kwargs).arguments
        routers = self.patch.current_routers()
        routers.check_savable(save_directory)
        push = call.pop("push_to_hub", False)
        more = call.pop("kwargs", {})
        given = call.get("state_dict")
        self._keep_routers_out_of(self.model.state_dict() if given is None else given)
        stock(**call, **({} if push else more))
        if call.get("is_main_process", True):
            routers.save_pretrained(save_directory)
        if push:  # from a temporary folder, with the routers
            repo_id = more.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.model.push_to_hub(repo_id, token=call.get("token"), **more)

    def _keep_routers_out_of(self, state_dict: dict[str, Any]) -> None:
        """Tells the stock ``save_pretrained`` to leave the routers out, whatever took the place of their layers."""
        own = {key for key in state_dict if ".flux_router." in key}
        self.model._keys_to_ignore_on_save = {*(self.ignored_on_save or ()), *own}
