# SPDX-License-Identifier: Apache-2.0
"""The demo's model server: llama.cpp's own OpenAI-compatible HTTP server, started with settings for a small host."""
