// SPDX-License-Identifier: Apache-2.0

// Moat-health asks one HTTP question and prints one readable line: the health check of images
// that have neither a shell nor Python.
//
//	moat-health HOST PORT PATH
//
// Exit code 0 for an answer of 200 to 299, 1 for any other answer or none, 2 for wrong usage.
// The standard net package alone keeps the program at about 2 MB.
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// Below the timeout of the engine's health check, so that the reason is ours to print.
const timeout = 2 * time.Second

// ask returns the status code of a GET, by HTTP/1.0 so that the server closes the connection.
func ask(host, port, path string) (int, error) {
	conn, err := net.DialTimeout("tcp", net.JoinHostPort(host, port), timeout)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.0\r\nHost: %s\r\nUser-Agent: moat-health\r\nConnection: close\r\n\r\n", path, host)
	if err != nil {
		return 0, err
	}
	// A status line is short; whatever answers without one is not what we asked for.
	line, err := bufio.NewReader(io.LimitReader(conn, 4096)).ReadString('\n')
	if err != nil {
		return 0, fmt.Errorf("no status line: %w", err)
	}
	fields := strings.Fields(line)
	if len(fields) < 2 || !strings.HasPrefix(fields[0], "HTTP/") {
		return 0, fmt.Errorf("not HTTP: %q", strings.TrimSpace(line))
	}
	return strconv.Atoi(fields[1])
}

func main() {
	if len(os.Args) != 4 || !strings.HasPrefix(os.Args[3], "/") || strings.ContainsAny(os.Args[3], " \r\n") {
		fmt.Fprintln(os.Stderr, "usage: moat-health HOST PORT PATH")
		os.Exit(2)
	}
	host, port, path := os.Args[1], os.Args[2], os.Args[3]
	where := net.JoinHostPort(host, port) + path
	started := time.Now()
	status, err := ask(host, port, path)
	took := time.Since(started).Round(time.Millisecond)
	switch {
	case err != nil:
		fmt.Printf("unhealthy: %s: %v\n", where, err)
		os.Exit(1)
	case status < 200 || status > 299:
		fmt.Printf("unhealthy: %s answered %d in %s\n", where, status, took)
		os.Exit(1)
	default:
		fmt.Printf("healthy: %s answered %d in %s\n", where, status, took)
	}
}
