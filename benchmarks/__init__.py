"""One script per question: each prints a table and writes JSON under out/. srfx imports none of them."""
