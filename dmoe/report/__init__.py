"""One page about a monitored run: ``python -m dmoe.report RUN``. See :mod:`dmoe.monitoring` for what writes a run.

``reading.py`` reads the folder, ``columns.py`` thins its steps, ``words.py`` says what they mean, and
``specialisation.py`` which tokens experts prefer; ``page.py`` puts that into HTML, with ``page.html``, ``page.css`` and
``page.js``, and ``pictures.py`` into PNGs.
"""
