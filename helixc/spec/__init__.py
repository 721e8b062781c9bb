"""From a YAML file to a Spec: text with spans, the schema, the short form. The only package that uses pydantic."""
