"""Reducers: fewer visual tokens before or inside the language model. One file a system.

Nearly every system is one choice for each slot of

    site -> score -> allocate -> select -> merge -> order / position -> cache

``score`` says how much each token matters, ``allocate`` what each part of the picture gets of the budget, ``select``
which tokens stay, ``merge`` what becomes of the others. The choices are functions of ``vistok.core``; site, positions
and cache are carried out by ``vistok.host``. A system's file names its choices, and its card repeats them in words.
Those with one stage that are such a chain are ``vistok.host.recipe.Recipe``s: each writes the steps that are its own,
and ``vistok.host.recipe.swap`` puts another step in the place of any of them.

``fastervlm`` is the one to read first. ``random``, ``uniform`` and ``pool`` are the controls that every other system
has to beat. A system sees ``Evidence`` (what is known of the visual tokens) and returns positions or a ``Reduction``:
see ``vistok.host.reducer``. The names of the slots are the fields of ``vistok.catalogue.Card``.
"""
