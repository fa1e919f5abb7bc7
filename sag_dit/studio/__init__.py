"""The studio: a page on which sliders draw; ``sag-dit studio``.

It is a skin over the public Python API: what is drawn is drawn by :meth:`LoadedModel.watch`, and
told by :mod:`sag_dit.output.telling`. :mod:`asking` turns what the controls say into a call,
:mod:`pictures` turns what comes back into HTML, and only :mod:`controls`, :mod:`app` and
:mod:`serving` know Gradio.
"""
