"""Retrieval: servers, engines, indexes, and the client that an agent searches with.

`client/` asks a server, `server/` answers over one engine, `engines/` find passages, `index/` reads
corpora and keeps indexes on disk. The commands (`retrieval_server`, `serp_search_server`,
`index_builder`, `make_corpus`) and what an engine of your own needs (`engine`, `serve`) stand
beside them. Nothing here imports `verl`: a retriever runs in an environment of its own.
"""
