"""How pages look: light and dark, narrow and printed. Every pair of text and ground has a contrast of 4.5 or more."""

from __future__ import annotations

STYLE = """
:root {
  --ground: #ffffff; --raised: #f4f6f8; --line: #c9d0d8; --ink: #1b1f24; --faint: #535c67; --link: #0b57a4;
  --first: #0b62b8; --second: #b3400c; --third: #1c7a4a; --fourth: #7b3fb0; --fifth: #8a6500; --sixth: #5c6570;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14181d; --raised: #1e242b; --line: #3d4754; --ink: #e6eaef; --faint: #a5b0bc; --link: #7db8f5;
    --first: #6cb2f5; --second: #f2915c; --third: #5fc990; --fourth: #c79bf0; --fifth: #dcb54a; --sixth: #a5b0bc;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font-size: .92em; overflow-wrap: anywhere; }
.skip { position: absolute; left: -100rem; background: var(--ground); padding: .5rem 1rem; }
.skip:focus { left: 1rem; top: .5rem; z-index: 1; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
main:focus { outline: none; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; list-style: none; }
.wide { overflow-x: auto; margin: 1rem 0 1.5rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption {
  text-align: left; color: var(--faint); padding-bottom: .4rem; max-width: min(46rem, 100vw - 2.5rem);
  position: sticky; left: 0;
}
th, td { padding: .25rem .55rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead th[scope=colgroup] { text-align: center; border-left: 1px solid var(--line); }
th.text, td.text, th[scope=row], th[scope=rowgroup] { text-align: start; }
td.text { white-space: normal; overflow-wrap: break-word; max-width: 24rem; }
td.excerpt { overflow-wrap: anywhere; min-width: 18rem; max-width: 40rem; }
td .whole { white-space: nowrap; }
tbody tr:nth-child(even) td { background: var(--raised); }
tbody + tbody { border-top: 1px solid var(--line); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 1.25rem; margin: 1rem 0; }
figure { margin: 0; max-width: 100%; overflow-x: auto; }
figcaption { font-size: .8125rem; color: var(--faint); max-width: 26rem; }
svg { display: block; max-width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text { font-family: inherit !important; fill: var(--ink); }
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .25rem .4rem; }
  td.excerpt { min-width: 14rem; }
}
@media print {
  :root {
    --ground: #ffffff; --raised: #f4f6f8; --line: #c9d0d8; --ink: #000000; --faint: #404850; --link: #000000;
    --first: #0b62b8; --second: #b3400c; --third: #1c7a4a; --fourth: #7b3fb0; --fifth: #8a6500; --sixth: #5c6570;
  }
  html { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip { display: none; }
  .wide { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .1rem .3rem; white-space: normal; }
  figure, tr, h2, h3 { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  thead { display: table-header-group; }
}
"""
