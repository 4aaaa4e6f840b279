"""The template of the data report: styles and layout, no logic beyond loops."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}: data report</title><style>
:root { --ink: #1c2330; --faint: #5b6577; --line: #dde2ea; --keep: #3b6fd4; --drop: #e0863a; --mark: #b3261e; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: var(--ink); }
h1, h2, h3 { font-weight: 600; margin-bottom: .3rem; } h2 { margin-top: 2.8rem; }
h3 code { font-size: 1rem; } p { margin: .3rem 0; } .faint, .group h4 { color: var(--faint); }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } code { font: .9em ui-monospace, monospace; }
.rule { border-top: 1px solid var(--line); padding-top: .8rem; margin-top: 1.4rem; }
.group h4 { font-size: .85rem; font-weight: 600; margin: .9rem 0 .3rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); gap: .8rem; }
.scores { columns: 22rem; column-gap: 1.2rem; }
.scores section { border: 1px solid var(--line); border-radius: .5rem; padding: .2rem 1rem .8rem; margin: 0 0 1.2rem;
break-inside: avoid; }
.scores .cards { grid-template-columns: 1fr; }
figure { margin: 0; } figure img { width: 100%; max-height: 9rem; object-fit: contain; object-position: left;
border-radius: .25rem; display: block; } .none { background: #f0f2f6; padding: 1.4rem; text-align: center; }
figcaption { font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; } figcaption p {
display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; margin: 0; }
svg { width: 100%; max-width: 30rem; height: auto; } svg text { font-size: 10px; fill: var(--faint); }
.keep { fill: var(--keep); } .drop { fill: var(--drop); } .axis { stroke: var(--line); }
.mark { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; } svg .limit { fill: var(--mark); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin: 0 .2em 0 .8em; }
</style></head><body>
{% macro figure(card) %}
<figure>{% if card.jpeg %}<img src="data:image/jpeg;base64,{{ card.jpeg }}" alt="{{ card.caption }}">
{% else %}<div class="none">no picture</div>{% endif %}
<figcaption><b>{{ card.key }}</b> <span class="faint">{{ card.value }}</span>
<p>{{ card.caption }}</p></figcaption></figure>
{% endmacro %}
{% macro groups(section) %}
{% for group in section.groups %}<div class="group"><h4>{{ group.title }}</h4>
<div class="cards">{% for card in group.cards %}{{ figure(card) }}{% endfor %}</div></div>{% endfor %}
{% endmacro %}
{% macro chart(h) %}
<svg viewBox="0 0 {{ size.width }} {{ size.height }}" role="img">
<line class="axis" x1="0" x2="{{ size.width }}" y1="{{ size.base }}" y2="{{ size.base }}"/>
{% for b in h.bars %}<g><title>{{ b.label }}</title>
<rect class="keep" x="{{ b.x }}" y="{{ b.kept_y }}" width="{{ b.width }}" height="{{ b.kept_height }}"/>
<rect class="drop" x="{{ b.x }}" y="{{ b.dropped_y }}" width="{{ b.width }}" height="{{ b.dropped_height }}"/></g>
{% endfor %}
{% for t in h.ticks %}<text x="{{ t.x }}" y="{{ size.base + 14 }}" text-anchor="{{ t.anchor }}">{{ t.label }}</text>
{% endfor %}
{% for m in h.limits %}<line class="mark" x1="{{ m.x }}" x2="{{ m.x }}" y1="10" y2="{{ size.base }}"/>
<text class="limit" x="{{ m.x }}" y="8" text-anchor="middle">{{ m.label }}</text>{% endfor %}
</svg>
{% endmacro %}
<h1>{{ name }}</h1>
<p>{{ num_clips }} clips, {{ hours }} hours; scored by {{ scorers }}.
{% if verdicts %}The rules keep <b>{{ num_kept }}</b> clips and drop <b>{{ num_clips - num_kept }}</b>.
{% else %}No rules were given: add <code>--select "motion &gt;= q0.25"</code> to see what one drops.{% endif %}</p>
{% if verdicts %}
<h2>Rules</h2>
<table><tr><th>rule</th><th>limit</th><th>drops</th><th>share</th><th>dropped by no other</th></tr>
{% for v in verdicts %}<tr><td><code>{{ v.rule.text }}</code></td>
<td>{% for limit in v.limits %}{{ "%.4g" | format(limit) }}{{ " to " if not loop.last }}{% endfor %}</td>
<td>{{ v.num_dropped }}</td><td>{{ "%.1f" | format(100 * v.num_dropped / v.keeps | length) }} %</td>
<td>{{ v.only }}</td></tr>{% endfor %}
<tr><th>all together</th><td></td><td>{{ num_clips - num_kept }}</td>
<td>{{ "%.1f" | format(100 * (num_clips - num_kept) / num_clips) }} %</td><td></td></tr></table>
{% for section in rules %}
<section class="rule"><h3><code>{{ section.title }}</code></h3><p class="faint">{{ section.text }}</p>
{% if section.histogram %}{{ chart(section.histogram) }}{% endif %}
{{ groups(section) }}</section>
{% endfor %}
{% endif %}
{% if faults %}
<h2>Clips that do not decode</h2>
<table><tr><th>clip</th><th>reason</th></tr>
{% for key, reason in faults %}<tr><td>{{ key }}</td><td>{{ reason }}</td></tr>{% endfor %}</table>
{% endif %}
<h2>Scores</h2>
<p class="faint"><span class="swatch" style="background: var(--keep)"></span>kept
<span class="swatch" style="background: var(--drop)"></span>dropped</p>
<div class="scores">
{% for section in scores %}
<section><h3>{{ section.title }}</h3><p class="faint">{{ section.text }}
{{- "; logarithmic" if section.histogram.is_log }}</p>
{{ chart(section.histogram) }}{{ groups(section) }}</section>
{% endfor %}
</div>
</body></html>
"""
