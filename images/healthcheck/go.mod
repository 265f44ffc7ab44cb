module moat/healthcheck

go 1.24
