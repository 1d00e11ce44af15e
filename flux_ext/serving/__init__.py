"""Routed models served by vLLM: routes per request and layer, pages given back while a request still runs.

vLLM loads ``flux_ext_vllm``, beside this package, which calls ``engine``. ``requests``, ``steps`` and ``layers`` are
what happens in a step, without vLLM; ``backend``, ``connector`` and ``page_manager`` are where vLLM calls them, and
``vllm_seam`` knows its names.
"""
