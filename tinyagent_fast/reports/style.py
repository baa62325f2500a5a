"""The style of every page: light or dark as the reader's system is, readable on a phone."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--soft:#f4f5f7;--ink:#1b1f24;--dim:#5c6570;--rule:#d8dce2;
--a:#1f6feb;--b:#b45309;--c:#15803d;--missing:#c0262d;--extra:#7c3aed;--note:#fff7e0}
@media (prefers-color-scheme:dark){:root{--bg:#12151a;--soft:#1b2027;--ink:#e6e9ed;--dim:#9aa5b1;
--rule:#343c47;--a:#6ea8fe;--b:#f0a95b;--c:#5fd08a;--missing:#ff8389;--extra:#c4a5ff;
--note:#2c2616}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:20px 16px 60px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.55rem;line-height:1.25;margin:0 0 4px}
h2{font-size:1.15rem;margin:38px 0 8px;padding-top:10px;border-top:1px solid var(--rule)}
h3{font-size:.95rem;margin:0 0 4px}
p{margin:6px 0}
.dim,.nothing,.entry{color:var(--dim)}
.nothing{font-style:italic}
.big{font-size:2.9rem;line-height:1.1;font-weight:650;letter-spacing:-.02em;margin:14px 0 2px}
.callout{background:var(--note);border-left:4px solid var(--b);border-radius:4px;
padding:8px 12px;margin:12px 0}
.callout ul{margin:4px 0;padding-left:20px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:18px}
figure{margin:0;min-width:0}
.chart{background:var(--soft);border-radius:8px;padding:12px}
figcaption{font-size:.85rem;display:flex;flex-wrap:wrap;gap:2px 16px}
.key{display:inline-block;width:16px;height:3px;margin:0 6px 4px 0;background:var(--ink)}
.key.a{background:var(--a)}.key.b{background:var(--b)}.key.c{background:var(--c)}
.key.band{height:10px;margin-bottom:0;opacity:.3}
svg{display:block}
.plot{width:100%;height:auto}
.plot text{font-size:12px;fill:var(--dim)}
.plot .y.tick{text-anchor:end}.plot .x{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--dim)}
.line{fill:none;stroke-width:1.8;stroke-linejoin:round}
.line.a{stroke:var(--a)}.line.b{stroke:var(--b);stroke-width:2.4}
.line.c{stroke:var(--c);stroke-dasharray:6 4}
.dot.a{fill:var(--a)}.dot.b{fill:var(--b)}.dot.c{fill:var(--c)}
.band{opacity:.2}.band.a{fill:var(--a)}.band.c,.key.band.c{fill:var(--c)}
.scroll{overflow-x:auto}
nav{font-size:.88rem;display:flex;flex-wrap:wrap;gap:2px 16px;margin:14px 0 0}
a{color:var(--a)}
table{border-collapse:collapse;width:100%;margin:6px 0;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);
overflow-wrap:break-word}
th{color:var(--dim);font-weight:600}
tr.marked td{background:var(--soft)}tr.marked td:first-child{font-weight:650}
td .share{width:130px;height:14px;margin-left:10px;display:inline-block;vertical-align:middle}
.bars{white-space:nowrap}
.track{fill:var(--rule);opacity:.6}.bar{fill:var(--a);opacity:.6}
.whisker{stroke:var(--ink);stroke-width:1.6;vector-effect:non-scaling-stroke}
.case{background:var(--soft);border-radius:8px;padding:14px;margin:14px 0}
.case .query{font-weight:600;margin:0 0 4px}
.tag{display:inline-block;border:1px solid var(--dim);border-radius:9px;padding:0 8px;
margin-right:6px;font-size:.82rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px;
margin:10px 0}
.pair figcaption{color:var(--dim);margin-bottom:4px}
.plan-graph{max-width:100%;height:auto;min-width:330px;color:var(--dim)}
.plan-graph rect{fill:var(--bg)}
.plan-graph .tool{fill:var(--ink)}.plan-graph .argument{fill:var(--dim)}
.plan-graph .problem{fill:var(--missing);font-weight:600}
.plan-graph .missing{color:var(--missing)}.plan-graph .missing .tool{fill:var(--missing)}
.plan-graph .extra{color:var(--extra)}.plan-graph .extra .tool{fill:var(--extra)}
.sign.missing{color:var(--missing)}.sign.extra{color:var(--extra)}
details{margin:6px 0}summary{cursor:pointer;color:var(--dim)}
pre{white-space:pre-wrap;background:var(--bg);border:1px solid var(--rule);border-radius:6px;
padding:8px;font:12.5px/1.45 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;margin:6px 0}
@media (max-width:600px){body{padding:14px 12px 40px}.case{padding:10px}.big{font-size:2.4rem}
td .share{display:block;margin:2px 0 0;width:110px}th,td{padding-right:10px}}
@media print{.case,.chart{break-inside:avoid}}
""".strip()
"""CSS of a page; drawings take their colours from it by class."""
