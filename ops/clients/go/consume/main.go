package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/twmb/franz-go/pkg/kgo"
)

func main() {
	client, err := kgo.NewClient(
		kgo.SeedBrokers(os.Args[1]),
		kgo.ConsumeTopics(os.Args[2]),
		kgo.ConsumerGroup(os.Args[3]),
		kgo.FetchIsolationLevel(kgo.ReadCommitted()), // the default is ReadUncommitted
		kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()),
		kgo.DisableAutoCommit(),
		kgo.BlockRebalanceOnPoll(),
	)
	if err != nil {
		log.Fatal(err)
	}
	defer client.CloseAllowingRebalance()
	seen := map[string]bool{} // in a service: a unique column of its database
	for patience := 20 * time.Second; ; patience = 5 * time.Second {
		client.AllowRebalance()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		fetches := client.PollRecords(ctx, 500)
		idle := ctx.Err() != nil
		cancel()
		if idle {
			return
		}
		if err := fetches.Err(); err != nil {
			log.Fatal(err)
		}
		for _, record := range fetches.Records() {
			var source string
			for _, header := range record.Headers {
				if header.Key == "source" {
					source = string(header.Value)
				}
			}
			// The same for a record that this group reads twice, as after a crash before its commit.
			if seen[source] {
				continue
			}
			seen[source] = true
			var event struct {
				ID     string      `json:"id"`
				Amount json.Number `json:"amount"` // its text: no binary float
			}
			if err := json.Unmarshal(record.Value, &event); err != nil {
				log.Fatal(err)
			}
			fmt.Println(source, string(record.Key), event.ID, event.Amount) // the work
		}
		// After the work, never before.
		if err := client.CommitUncommittedOffsets(context.Background()); err != nil {
			log.Fatal(err)
		}
	}
}
