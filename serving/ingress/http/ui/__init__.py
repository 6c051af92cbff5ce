"""The live page: what a router shows of the group to people who look, and the page itself (HTML, CSS, JavaScript).

May import: engine, link.
"""
