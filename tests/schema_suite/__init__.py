"""JSON-Schema-Test-Suite against our grammars: what of it is served, what is refused, and is what is served right?

`make json-schema-suite` fetches the suite, which the source of the package jsonschema carries, and rewrites
the tables in docs/structured-output.md. A schema is served if it compiles; then each of its instances is spelled with
the demo's tokens, and the matcher says whether that may be an answer.
"""
