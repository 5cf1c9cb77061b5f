"""The HTTP server: OpenAI's API over one or several models. Started by `octavo serve`; needs the extra `server`.

The way of a request: `auth` (a key), `body` (bounded JSON), `protocol/` (what may be asked, by endpoint), `sampling`
(its parameters), `run` (the requests of one call in the engine), then one of `chat`, `completions`, `responses`,
`embeddings`, which shape what comes back, whole or by `streams` (SSE). `errors` is the one place where an error becomes
a status, `models` the one place where a model is loaded. `app` puts it together.
"""
