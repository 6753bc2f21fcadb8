"""Small SVG charts, readable on a light and on a dark page. Only the standard library is needed."""

from xml.sax.saxutils import escape

WIDTH, LABEL, RIGHT, BAR, GAP, TOP = 720, 230, 110, 16, 8, 34
# Categorical colours that keep 3:1 against white and against GitHub's dark page.
COLOURS = ["#4c78d8", "#d9822b", "#3a9a6b", "#a35fc4", "#8a8f98"]
STYLE = """<style>
text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f; }
.quiet { fill: #57606a; } .line { stroke: #d0d7de; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .quiet { fill: #9ea7b3; } .line { stroke: #3d444d; } }
</style>"""


def stacked(title, names, rows, unit):
    """Horizontal bars. `names`: the parts; `rows`: (label, [value of each part], note)."""
    largest = max(sum(values) for _, values, _ in rows)
    scale = (WIDTH - LABEL - RIGHT) / largest
    height = TOP + 22 + len(rows) * (BAR + GAP) + 6
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
           f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">', STYLE,
           f'<text x="0" y="14" font-weight="600">{escape(title)}</text>']
    x = LABEL
    for name, colour in zip(names, COLOURS):
        out += [f'<rect x="{x}" y="24" width="10" height="10" rx="2" fill="{colour}"/>',
                f'<text class="quiet" x="{x + 15}" y="33">{escape(name)}</text>']
        x += 30 + 7 * len(name)
    y = TOP + 14
    bottom = y + len(rows) * (BAR + GAP)
    out.append(f'<line class="line" x1="{LABEL}" y1="{y - 4}" x2="{LABEL}" y2="{bottom}"/>')
    for label, values, note in rows:
        x = float(LABEL)
        out.append(f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        for name, value, colour in zip(names, values, COLOURS):
            width = value * scale
            if width >= 0.05:
                out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{colour}">'
                           f'<title>{escape(name)}: {value:.3g} {escape(unit)}</title></rect>')
            x += width
        out.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{escape(note)}</text>')
        y += BAR + GAP
    return "\n".join([*out, "</svg>"]) + "\n"
