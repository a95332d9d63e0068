"""One HTML page on a rewritten or compiled model: ``fxsparse.report(subject, "page.html")``.

| module | what |
|---|---|
| `write` | the public function: what the page shows, into the template |
| `layers` | the sites of the model by layer, with what each pass did there |
| `block` | one block of a graph as lines, before and after, with what was inserted and removed |
| `backward` | the backward pass of a block |
| `charts` | bars and lines as SVG |

``template.html``, ``style.css`` and ``script.js`` become one file that makes no request. It needs jinja2:
``pip install fxsparse[report]``.
"""
